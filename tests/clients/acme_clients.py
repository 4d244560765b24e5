"""The ACME clients, each behind the same few methods.

client = CLIENTS["lego 4.9"].of(host)
(chain,) = client.order(["a.example", "b.example"], "ec")
client.revoke(chain)
"""

from __future__ import annotations

import contextlib
import gzip
import ipaddress
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from clients.fetch import HERE, place, up_to_date
from conftest import OPENSSL, free_port, wait_until
from host import CONTACT, PROGRAMS, Host
from openssl_versions import system_libraries

PATIENCE = 300  # seconds that one run of a client may take, on a busy machine; no test waits for them to pass


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False


class Client:
    """One client, with its account and its certificates in a directory. What it cannot do is said by these attributes.

    Attributes:
        package: Debian's, where it comes from there.
        keys: the kinds of keys that it makes.
        wildcards, addresses: whether it orders such names.
        separate: whether it orders a certificate for each name.
        renews, revokes: whether it has a command for it.
        reason: whether its revocation has a reason.
        tls: whether it speaks to ACME servers by TLS only.
    """

    package = ""
    keys: tuple[str, ...] = ("ec", "rsa")
    wildcards = True
    addresses = False
    separate = False
    renews = True
    revokes = True
    reason = True
    tls = False

    def __init__(self, source: str, host: Host) -> None:
        self.root = place(source) / "root"
        self.source = source
        self.host = host
        self.url = f"{host.url}/directory"
        self.directory = host.directory / "client"
        self.directory.mkdir()
        self.webroot = self.directory / "webroot"
        self.webroot.mkdir()
        self.environment = dict(host.environment)
        self.hook = self.directory / "hook"
        self.hook.write_text("#!/bin/sh\nexit 0\n")  # proves control over names: nobody looks
        self.hook.chmod(0o755)

    def order(self, names: list[str], key: str) -> list[Path]:
        """Order a certificate. Returns the file with its chain; of a `separate` client one for each name."""
        raise NotImplementedError

    def renew(self, names: list[str], key: str) -> Path:
        """Renew what was ordered, although it is not due. Returns the file with the new chain."""
        return self.order(names, key)[0]

    def revoke(self, chain: Path) -> None:
        """Revoke the certificate in the file, as superseded if the client gives reasons."""
        raise NotImplementedError

    def version(self) -> str:
        """The client's version; of Debian's, by their changelogs, for some do not know it themselves."""
        changelog = self.root / "usr/share/doc" / self.package / "changelog.Debian.gz"
        return self.found(r"\((?:\d+:)?([0-9.]+)", gzip.decompress(changelog.read_bytes()).decode())

    def close(self) -> None:
        """End what still runs."""

    def trusted(self) -> Path:
        """The root of the ACME server's own certificate."""
        return next(self.host.directory.glob("ca-*/root.pem"))

    def command(self, path: str, *arguments: str | Path) -> list[str]:
        """A program of Debian's package, run with the C library that it was made for."""
        loader, libraries = system_libraries(self.root)
        program = self.root / path
        return [
            str(self.root / loader),
            "--library-path",
            str(self.root / libraries),
            str(program),
            *map(str, arguments),
        ]

    def run(self, *command: str | Path, check: bool = True) -> str:
        """Run a program to its end. Returns its output."""
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
        assert done.returncode == 0 or not check, f"{done.stdout}\n{self.host.log()}"
        return done.stdout

    def found(self, pattern: str, text: str) -> str:
        """The first group of a pattern that must be there."""
        match = re.search(pattern, text)
        assert match, f"no {pattern} in {text[:1000]}"
        return match.group(1)


class Certbot(Client):
    """certbot of the tests' own virtual environment, or Debian's."""

    @property
    def addresses(self) -> bool:  # type: ignore[override]
        return "--ip-address" in self.run(*self.certbot("--help", "all"), check=False)

    def certbot(self, *arguments: str | Path) -> list[str]:
        own = [
            f"--config-dir={self.directory}",
            f"--work-dir={self.directory}/work",
            f"--logs-dir={self.directory}/log",
        ]
        given = [*map(str, arguments), "--non-interactive", *own]
        if self.source == "venv":
            return [str(PROGRAMS / "certbot"), *given]
        self.environment.update(PYTHONHOME=str(self.root / "usr"), PYTHONNOUSERSITE="1")
        return self.command("usr/bin/python3.11", self.root / "usr/bin/certbot", *given)

    def order(self, names: list[str], key: str) -> list[Path]:
        options = ["--agree-tos", "-m", CONTACT, "--server", self.url, "--cert-name", "own"]
        options += ["--key-type", {"ec": "ecdsa", "rsa": "rsa"}[key], "--manual", "--manual-auth-hook", str(self.hook)]
        options += ["--preferred-challenges", "http,dns", "--force-renewal"]
        for name in names:
            options += ["--ip-address" if is_address(name) else "-d", name]
        self.run(*self.certbot("certonly", *options))
        return [self.directory / "live" / "own" / "fullchain.pem"]

    def renew(self, names: list[str], key: str) -> Path:
        self.run(*self.certbot("renew", "--force-renewal", "--no-random-sleep-on-renew"))
        return self.directory / "live" / "own" / "fullchain.pem"

    def revoke(self, chain: Path) -> None:
        options = ["--cert-path", str(chain), "--reason", "superseded", "--no-delete-after-revoke"]
        self.run(*self.certbot("revoke", *options, "--server", self.url))

    def version(self) -> str:
        return self.found(r"certbot (\S+)", self.run(*self.certbot("--version")))


class Lego(Client):
    """lego gives up after 30 seconds unless it is told otherwise: --cert.timeout."""

    package = "lego"

    without_information: tuple[str, ...] = ()

    def lego(self, names: list[str], key: str, *arguments: str) -> str:
        self.environment.update(EXEC_PATH=str(self.hook), LEGO_DISABLE_CNAME_SUPPORT="true")
        self.environment["LEGO_CA_CERTIFICATES"] = str(self.trusted())
        options = ["--server", self.url, "--path", str(self.directory), "-a", "-m", CONTACT, "--cert.timeout", "120"]
        options += ["--key-type", {"ec": "ec256", "rsa": "rsa2048"}[key]]
        options += ["--http", "--http.webroot", str(self.webroot), "--dns", "exec", "--dns.disable-cp"]
        for name in names:
            options += ["-d", name]
        return self.run(*self.command("usr/bin/lego", *options, *arguments))

    def chain(self, name: str) -> Path:
        return self.directory / "certificates" / f"{name.replace('*', '_')}.crt"

    def order(self, names: list[str], key: str) -> list[Path]:
        self.lego(names, key, "run")
        return [self.chain(names[0])]

    def renew(self, names: list[str], key: str) -> Path:
        self.lego(names, key, "renew", "--days", "9999", "--no-random-sleep", *self.without_information)
        return self.chain(names[0])

    def revoke(self, chain: Path) -> None:
        self.lego([chain.stem], "ec", "revoke", "--keep", "--reason", "4")


class NewLego(Lego):
    """It renews when the renewal information (RFC 9773) says so, unless it is not to ask; and it wants TLS."""

    tls = True
    without_information = ("--ari-disable",)


class AcmeSh(Client):
    package = "acme.sh"
    addresses = True

    def acme_sh(self, *arguments: str) -> str:
        hooks = self.directory / "dnsapi"
        hooks.mkdir(exist_ok=True)
        (hooks / "dns_none.sh").write_text("dns_none_add() { :; }\ndns_none_rm() { :; }\n")
        script = self.root / "usr/share/acme.sh/acme.sh"
        return self.run("sh", script, "--home", self.directory, "--server", self.url, *arguments)

    def order(self, names: list[str], key: str) -> list[Path]:
        options = ["-k", {"ec": "ec-256", "rsa": "2048"}[key], "--accountemail", CONTACT, "--dnssleep", "1"]
        for name in names:
            options += ["-d", name]
            options += ["--dns", "dns_none"] if name.startswith("*") else ["-w", str(self.webroot)]
        self.acme_sh("--issue", *options)
        return [self.directory / f"{names[0]}{'_ecc' if key == 'ec' else ''}" / "fullchain.cer"]

    def renew(self, names: list[str], key: str) -> Path:
        self.acme_sh("--renew", "--force", "-d", names[0], *(["--ecc"] if key == "ec" else []))
        return self.directory / f"{names[0]}{'_ecc' if key == 'ec' else ''}" / "fullchain.cer"

    def revoke(self, chain: Path) -> None:
        name, suffix, _ = chain.parent.name.partition("_ecc")
        self.acme_sh("--revoke", "-d", name, "--revoke-reason", "4", *(["--ecc"] if suffix else []))


class Dehydrated(Client):
    package = "dehydrated"
    reason = False

    def dehydrated(self, *arguments: str | Path) -> str:
        config = self.directory / "config"
        if not config.exists():
            lines = [f"CA={self.url}", f"BASEDIR={self.directory}", f"WELLKNOWN={self.webroot}"]
            lines += [f"CONTACT_EMAIL={CONTACT}", "OCSP_FETCH=no"]
            config.write_text("\n".join([*lines, ""]))
            self.dehydrated("--register", "--accept-terms")
        return self.run("bash", self.root / "usr/bin/dehydrated", "--config", config, *arguments)

    def order(self, names: list[str], key: str) -> list[Path]:
        options = ["--algo", {"ec": "prime256v1", "rsa": "rsa"}[key], "--force", "--domain", " ".join(names)]
        wild = [name for name in names if name.startswith("*")]
        options += ["--challenge", "dns-01", "--hook", str(self.hook)] if wild else []
        self.dehydrated("--cron", "--alias", "own", *options)
        return [self.directory / "certs" / "own" / "fullchain.pem"]

    def revoke(self, chain: Path) -> None:
        self.dehydrated("--revoke", chain.with_name("cert.pem").resolve())


class Uacme(Client):
    package = "uacme"
    addresses = True

    def uacme(self, *arguments: str | Path) -> str:
        return self.run(*self.command("usr/bin/uacme", "-a", self.url, "-c", self.directory, *arguments))

    def order(self, names: list[str], key: str) -> list[Path]:
        if not (self.directory / "private" / "key.pem").exists():
            self.uacme("-y", "new", CONTACT)
        options = ["-f", "-h", str(self.hook), "-t", key.upper(), "-b", {"ec": "256", "rsa": "2048"}[key]]
        shutil.rmtree(self.directory / "private" / names[0], ignore_errors=True)  # else the key stays what it is
        self.uacme(*options, "issue", *names)
        return [self.directory / names[0] / "cert.pem"]

    def revoke(self, chain: Path) -> None:
        self.uacme("-r", "4", "revoke", chain)


class AcmeTiny(Client):
    package = "acme-tiny"
    revokes = reason = False
    wildcards = False

    def order(self, names: list[str], key: str) -> list[Path]:
        alternative = "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)
        return [self.sign(self.csr("/", key, "-addext", alternative), self.directory / "chain.pem")]

    def csr(self, subject: str, key: str, *options: str) -> Path:
        """A CSR as administrators make it."""
        csr = self.directory / "own.csr"
        new = {"ec": ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"], "rsa": ["rsa:2048"]}[key]
        options = ("-nodes", "-keyout", str(self.directory / "own.key"), "-subj", subject, *options)
        self.run(OPENSSL, "req", "-new", "-newkey", *new, *options, "-out", csr)
        return csr

    def sign(self, csr: Path, chain: Path) -> Path:
        """Order for any CSR."""
        account = self.directory / "account.key"
        if not account.exists():
            self.run(OPENSSL, "genrsa", "-out", account, "2048")
        options: list[str | Path] = ["--account-key", account, "--csr", csr, "--acme-dir", self.webroot]
        options += ["--directory-url", self.url, "--disable-check", "--contact", f"mailto:{CONTACT}"]
        output = self.run(sys.executable, self.root / "usr/lib/python3/dist-packages/acme_tiny.py", *options)
        chain.write_text(output[output.index("-----BEGIN") :])  # its log is in the output, too
        return chain


class Caddy(Client):
    """Caddy orders a certificate for each name, as soon as it runs, and renews it by itself."""

    package = "caddy"

    separate = True
    wildcards = renews = revokes = False
    running: subprocess.Popen[bytes] | None = None

    def order(self, names: list[str], key: str) -> list[Path]:
        self.close()
        storage = self.directory / "storage" / key
        kind = {"ec": "p256", "rsa": "rsa2048"}[key]
        config = self.directory / "Caddyfile"
        config.write_text(
            f"""{{
                acme_ca {self.url}
                email {CONTACT}
                key_type {kind}
                admin off
                skip_install_trust
                default_bind 127.0.0.1
                http_port {free_port()}
                https_port {free_port()}
                storage file_system {storage}
            }}
            {", ".join(names)} {{
                respond "here"
            }}
            """
        )
        chains = [Path(f"certificates/*/{name}/{name}.crt") for name in names]
        with (self.directory / "log").open("wb") as log:
            command = self.command("usr/bin/caddy", "run", "--adapter", "caddyfile", "--config", config)
            self.running = subprocess.Popen(
                command, cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(lambda: all(list(storage.glob(str(chain))) for chain in chains), "Caddy's certificates", PATIENCE)
        return [next(storage.glob(str(chain))) for chain in chains]

    def close(self) -> None:
        if self.running:
            self.running.terminate()
            self.running.wait()


class ModMd(Client):
    """Apache's mod_md orders as soon as the server runs, with a key of each kind for the same names."""

    wildcards = renews = revokes = False
    keys = ("both",)
    running: subprocess.Popen[bytes] | None = None

    def order(self, names: list[str], key: str) -> list[Path]:
        # Its child processes run as another user, who may not enter the tests' directory.
        self.home = Path(tempfile.mkdtemp(prefix="mod-md-"))
        self.home.chmod(0o755)
        modules = self.root / "usr/lib/apache2/modules"
        plain, tls = free_port(), free_port()
        lines = [
            f"LoadModule {name}_module {modules}/mod_{name}.so" for name in ("mpm_event", "authz_core", "ssl", "md")
        ]
        lines += [
            f"ServerRoot {self.home}",
            f"PidFile {self.home}/pid",
            f"ErrorLog {self.home}/log",
            "LogLevel md:debug",
        ]
        lines += [f"Listen 127.0.0.1:{plain}", f"Listen 127.0.0.1:{tls}", f"MDPortMap http:{plain} https:{tls}"]
        lines += ["User #33", "Group #33"]
        lines += [f"MDStoreDir {self.home}/md", f"MDCertificateAuthority {self.url}", "MDCertificateAgreement accepted"]
        lines += [f"MDContactEmail {CONTACT}", "MDPrivateKeys secp256r1 rsa2048", f"MDomain {' '.join(names)}"]
        lines += [f"ServerName {names[0]}", f"DefaultRuntimeDir {self.home}", f"<VirtualHost 127.0.0.1:{tls}>"]
        lines += [f"ServerName {names[0]}", f"ServerAlias {' '.join(names)}", "SSLEngine on", "</VirtualHost>"]
        config = self.home / "httpd.conf"
        config.write_text("\n".join([*lines, ""]))
        self.running = subprocess.Popen(
            self.command("usr/sbin/apache2", "-f", config, "-X", "-DFOREGROUND"),
            env=self.environment,
            stdin=subprocess.DEVNULL,
        )
        staging = self.home / "md" / "staging" / names[0]
        chains = [staging / "pubcert.pem", staging / "pubcert.secp256r1.pem"]
        wait_until(lambda: all(chain.exists() for chain in chains), "mod_md's certificates", PATIENCE)
        return chains

    def close(self) -> None:
        if self.running:
            self.running.terminate()
            self.running.wait()
            shutil.rmtree(self.home, ignore_errors=True)

    def version(self) -> str:
        module = (self.root / "usr/lib/apache2/modules/mod_md.so").read_bytes()
        return self.found(r"\0(2\.\d+\.\d+)\0", module.decode("latin-1"))


class Library(Client):
    """A library, in a program of ours: URL DIRECTORY order KEY CHAIN NAME... | URL DIRECTORY revoke CHAIN REASON"""

    def program(self) -> list[str]:
        """The program, its first arguments among them."""
        raise NotImplementedError

    def order(self, names: list[str], key: str) -> list[Path]:
        chain = self.directory / f"{key}.pem"
        self.run(*self.program(), self.url, self.directory, "order", key, chain, *names)
        return [chain]

    def revoke(self, chain: Path) -> None:
        self.run(*self.program(), self.url, self.directory, "revoke", chain, "superseded")


class Acme4j(Library):
    addresses = True

    def program(self) -> list[str]:
        jars = place("acme4j")
        return ["java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", "-cp", f"{jars}:{jars}/*", "Acme4j"]

    def version(self) -> str:
        return self.found(r"acme4j-client-([0-9.]+)\.jar", " ".join(os.listdir(place("acme4j"))))


class AcmeClient(Library):
    def program(self) -> list[str]:
        self.environment["NODE_PATH"] = str(place("acme-client") / "node_modules")
        return ["node", str(HERE / "acme_client.js")]

    def version(self) -> str:
        text = (place("acme-client") / "node_modules/acme-client/package.json").read_text(encoding="utf-8")
        return self.found(r'"version": "(\S+)"', text)


class InstantAcme(Library):
    """It speaks to no server without TLS."""

    keys = ("ec",)
    addresses = True
    tls = True

    def program(self) -> list[str]:
        return [str(place("instant-acme") / "instant_acme_client")]

    def order(self, names: list[str], key: str) -> list[Path]:
        chain = self.directory / f"{key}.pem"
        self.run(*self.program(), self.url, self.trusted(), self.directory, "order", chain, *names)
        return [chain]

    def revoke(self, chain: Path) -> None:
        self.run(*self.program(), self.url, self.trusted(), self.directory, "revoke", chain, "superseded")

    def version(self) -> str:
        return self.found(r'instant-acme = \{ version = "=(\S+?)"', (HERE / "instant_acme/Cargo.toml").read_text())


class PythonAcme(Library):
    addresses = True

    def program(self) -> list[str]:
        return [sys.executable, str(HERE / "python_acme.py")]

    def version(self) -> str:
        return self.found(
            r"^(\S+)", self.run(sys.executable, "-c", "import importlib.metadata as m; print(m.version('acme'))")
        )


class Entry(NamedTuple):
    """A client, and what of fetch.NEEDED it comes from (`venv`: the tests' virtual environment)."""

    kind: type[Client]
    source: str

    def missing(self) -> str:
        """Why its tests are skipped; empty if it is there."""
        if self.source == "venv" or up_to_date(self.source):
            return ""
        return f"{self.source} could not be fetched"

    @contextlib.contextmanager
    def of(self, host: Host) -> Iterator[Client]:
        """A client of `host`."""
        client = self.kind(self.source, host)
        try:
            yield client
        finally:
            client.close()


CLIENTS = {
    "certbot, newest": Entry(Certbot, "venv"),
    "certbot, Debian 12": Entry(Certbot, "bookworm"),
    "lego, Debian sid": Entry(NewLego, "sid"),
    "lego, Debian 12": Entry(Lego, "bookworm"),
    "acme.sh": Entry(AcmeSh, "sid"),
    "dehydrated, Debian sid": Entry(Dehydrated, "sid"),
    "dehydrated, Debian 12": Entry(Dehydrated, "bookworm"),
    "uacme, Debian sid": Entry(Uacme, "sid"),
    "uacme, Debian 12": Entry(Uacme, "bookworm"),
    "acme-tiny, Debian sid": Entry(AcmeTiny, "sid"),
    "acme-tiny, Debian 12": Entry(AcmeTiny, "bookworm"),
    "Caddy, Debian sid": Entry(Caddy, "sid"),
    "Caddy, Debian 12": Entry(Caddy, "bookworm"),
    "mod_md": Entry(ModMd, "bookworm"),
    "acme4j": Entry(Acme4j, "acme4j"),
    "acme-client of npm": Entry(AcmeClient, "acme-client"),
    "instant-acme": Entry(InstantAcme, "instant-acme"),
    "Python's acme": Entry(PythonAcme, "venv"),
}
