"""Other makers' CMP servers, in Java, with keys made on the spot, on loopback: XiPKI's CA and Siemens' RA.

    with Xipki(tmp_path / "xipki") as ca:
        handler = handlers(ca.options("secret"))

Their programs are XipkiCa.java and SiemensRa.java beside this file, compiled by fetch.py against the makers' jars.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import ipaddress
import json
import os
import signal
import subprocess
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID as Eku
from cryptography.x509.oid import NameOID

from conftest import OPENSSL, free_port
from demo_ca import DemoCA
from servers.fetch import CLASSES, JARS

PASSWORD = "changeit"  # of the PKCS #12 files, as in Web.java
START_SECONDS = 120
# For a busy machine, and a Java machine that has just started. No test waits for these to pass.
PATIENCE = {"cmp_msg_timeout": "60", "cmp_total_timeout": "120"}
Key = Union[ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey]


class Pki:
    """Certificates and keys in a directory: NAME.pem, NAME.key and NAME.p12, each with its chain up to the root."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made: dict[str, tuple[Key, list[x509.Certificate]]] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def make(self, name: str, common_name: str, issuer: str = "", *, ca: bool = False, key: str = "ec") -> None:
        """A certificate of `issuer`, self-signed without one. Leaves serve for CMP and TLS, at 127.0.0.1."""
        private: Key = ec.generate_private_key(ec.SECP256R1())
        if key == "rsa":
            private = rsa.generate_private_key(65537, 2048)
        parts = {NameOID.COUNTRY_NAME: "DE", NameOID.ORGANIZATION_NAME: "Acme", NameOID.COMMON_NAME: common_name}
        subject = x509.Name([x509.NameAttribute(oid, value) for oid, value in parts.items()])
        signer, chain = self.made[issuer] if issuer else (private, [])
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(chain[0].subject if chain else subject)
        builder = builder.public_key(private.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=100 if not ca else 1000))
        builder = builder.add_extension(x509.BasicConstraints(ca, None), True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), False)
        issuing = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        builder = builder.add_extension(issuing, False)
        usage = dict.fromkeys(
            "content_commitment key_encipherment data_encipherment key_agreement encipher_only decipher_only".split(),
            False,
        )
        usage.update(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca)
        builder = builder.add_extension(x509.KeyUsage(**usage), True)
        if not ca:
            names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
            builder = builder.add_extension(x509.ExtendedKeyUsage([Eku.SERVER_AUTH, Eku.CLIENT_AUTH]), False)
        certificate = builder.sign(signer, hashes.SHA256())
        self.made[name] = private, [certificate, *chain]
        self._write(name)

    def _write(self, name: str) -> None:
        key, chain = self.made[name]
        self.trust(name, name)
        plain = serialization.NoEncryption()
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        (self.directory / f"{name}.key").write_bytes(key.private_bytes(encoding, form, plain))
        encryption = serialization.BestAvailableEncryption(PASSWORD.encode())
        store = pkcs12.serialize_key_and_certificates(name.encode(), key, chain[0], chain[1:], encryption)
        (self.directory / f"{name}.p12").write_bytes(store)

    def trust(self, file: str, *names: str) -> Path:
        """FILE.pem with the certificates of these names, their issuers included."""
        chains = [certificate for name in names for certificate in self.made[name][1]]
        path = self.directory / f"{file}.pem"
        path.write_bytes(b"".join(c.public_bytes(serialization.Encoding.PEM) for c in dict.fromkeys(chains)))
        return path

    def adopt(self, name: str, chain: bytes, key: bytes) -> None:
        """NAME's files of a key and certificates in PEM that somebody else has made."""
        private = serialization.load_pem_private_key(key, None)
        assert isinstance(private, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey))
        self.made[name] = private, x509.load_pem_x509_certificates(chain)
        self._write(name)


class JavaServer:
    """A server in a process of its own, which ends with us; its log is shown if it does not start."""

    program = ""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log_file = directory / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def arguments(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        """Start it, and return once it says that it is ready."""
        classpath = os.pathsep.join([str(CLASSES / self.program), f"{JARS / self.program}/*"])
        command = ["java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx512m", "-cp", classpath]
        position = self.log_file.stat().st_size if self.log_file.exists() else 0
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments()],
                cwd=self.directory,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if b"\nready\n" in b"\n" + self.log_file.read_bytes()[position:]:
                return
            time.sleep(0.05)
        self.stop()
        raise AssertionError(f"{self.program} did not start:\n{self.log()[-8000:]}")

    def stop(self) -> None:
        """End it at once, as a power failure would."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            if self.process.stdin:
                self.process.stdin.close()
            self.process = None

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Any:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def client_identities(pki: Pki) -> None:
    """The certificates with which the handler comes: of RAs that are known, have no rights, or are unknown."""
    pki.make("clients-root", "Test RA Clients", ca=True)
    pki.make("ra-ec", "Test RA with EC", "clients-root")
    pki.make("ra-rsa", "Test RA with RSA", "clients-root", key="rsa")
    pki.make("no-rights", "Test RA with no rights", "clients-root")
    pki.make("strangers-root", "Strangers", ca=True)
    pki.make("stranger", "Test RA with EC", "strangers-root")


def properties(path: Path, **settings: object) -> None:
    """A Java properties file; __ in a key stands for a dot."""
    path.write_text("".join(f"{key.replace('__', '.')}={value}\n" for key, value in settings.items()))


class Upstream(NamedTuple):
    """The CA behind an RA: its address and name, its certificates, and the RA's own for it."""

    url: str
    recipient: str
    chain: Sequence[Path]
    certificate: Path
    key: Path


def demo_upstream(ca: DemoCA) -> Upstream:
    """The demo CA, and its RA certificate."""
    file = ca.directory.joinpath
    chain = [file("sub.pem"), file("root.pem")]
    return Upstream(f"http://{ca.server}/{ca.path}", "", chain, file("ra.pem"), file("ra.key"))


class SiemensRa(JavaServer):
    """Siemens' RA component before a CA. `path` says how it answers, see SiemensRa.java."""

    program = "SiemensRa"
    ref, secret = "acme", "the secret of the RA"

    def __init__(self, directory: Path, upstream: Upstream) -> None:
        super().__init__(directory)
        self.pki = pki = Pki(directory)
        self.port, self.tls_port, self.mutual_port = free_port(), free_port(), free_port()
        client_identities(pki)
        pki.make("ra-root", "Test RA Root", ca=True)
        pki.make("ra", "Test RA Signer", "ra-root")
        pki.make("tls", "localhost", "ra-root")
        ca = b"".join(path.read_bytes() for path in upstream.chain)
        pki.adopt("upstream", upstream.certificate.read_bytes() + ca, upstream.key.read_bytes())
        (directory / "ca.pem").write_bytes(ca)
        self.trusted = directory / "trusted.pem"  # the RA's root and the CA's, and what leads to them
        self.trusted.write_bytes((directory / "ra-root.pem").read_bytes() + ca)
        pki.trust("clients", "clients-root")
        properties(
            directory / "ra.properties",
            port=self.port,
            port__tls=self.tls_port,
            port__mutual=self.mutual_port,
            upstream=upstream.url,
            recipient=upstream.recipient,
            openssl=OPENSSL,
            ref=self.ref,
            secret=self.secret,
            ca="ca.pem",
            clients="clients.pem",
            ra__keys="ra.p12",
            upstream__keys="upstream.p12",
            tls__keys="tls.p12",
            tls__trusted="clients.pem",
        )

    def arguments(self) -> list[str]:
        return ["SiemensRa", str(self.directory / "ra.properties")]

    def options(self, path: str = "secret", ra: str = "ra-ec") -> dict[str, str]:
        """The section that fits; RA certificate `ra`, unless the path says that a secret protects the messages."""
        options = {
            "cmp_server": f"127.0.0.1:{self.port}",
            "cmp_path": path,
            "cmp_recipient": "C=DE, O=Acme, CN=Test RA Signer",
            **PATIENCE,
        }
        if "secret" in path:
            options.update(cmp_ref=self.ref, cmp_secret=self.secret, cmp_untrusted=str(self.trusted))
        else:
            options.update(cmp_cert=f"{self.directory}/{ra}.pem", cmp_key=f"{self.directory}/{ra}.key")
            options["cmp_trusted"] = str(self.trusted)
        if path.startswith(("signed", "held-signed", "p10")):
            options["cmp_expect_sender"] = options["cmp_recipient"]
        return options

    def tls(self, *, mutual: bool) -> dict[str, str]:
        """What changes for TLS, with or without a client's certificate."""
        return tls_options(self.directory, self.mutual_port if mutual else self.tls_port, "ra-root", mutual=mutual)

    def release(self, *, go: bool) -> None:
        """Let what is held go to the CA, or hold what comes."""
        if go:
            (self.directory / "release").touch()
        else:
            (self.directory / "release").unlink(missing_ok=True)

    def restart(self) -> None:
        """End it without warning, and start it again."""
        self.stop()
        self.start()


def tls_options(directory: Path, port: int, trusted: str, *, mutual: bool) -> dict[str, str]:
    options = {
        "cmp_server": f"127.0.0.1:{port}",
        "cmp_tls_used": "True",
        "cmp_tls_trusted": f"{directory}/{trusted}.pem",
    }
    if mutual:
        options.update(cmp_tls_cert=f"{directory}/ra-ec.pem", cmp_tls_key=f"{directory}/ra-ec.key")
    return options


PROFILE_KEYS = {
    "1.2.840.113549.1.1.1": {"rsa": {"modulus": [2048, 3072, 4096]}},
    "1.2.840.10045.2.1": {
        "ec": {
            "curves": [{"oid": "1.2.840.10045.3.1.7"}, {"oid": "1.3.132.0.34"}, {"oid": "1.3.132.0.35"}],
            "pointEncodings": [4],
        }
    },
    "1.3.101.112": {},
}


def tls_profile(*, days: int) -> dict[str, Any]:
    """A certificate profile of XiPKI for TLS servers: what may stand in a request, and what gets into a certificate."""
    keys = []
    for oid, parameters in PROFILE_KEYS.items():
        keys.append({"algorithms": [{"oid": oid}], **({"parameters": parameters} if parameters else {})})
    rdns = [{"type": {"oid": oid}, "minOccurs": 0} for oid in ("2.5.4.6", "2.5.4.10", "2.5.4.11")]
    rdns.append({"type": {"oid": "2.5.4.3"}, "regex": "^(?!.*forbidden).*$"})
    extensions: list[dict[str, Any]] = [
        {"type": {"oid": "2.5.29.14"}, "required": True},
        {"type": {"oid": "2.5.29.35"}, "required": True},
        {"type": {"oid": "2.5.29.19"}, "critical": True, "required": True},
        {
            "type": {"oid": "2.5.29.17"},
            "required": True,
            "inRequest": "optional",
            "subjectAltName": {"modes": ["DNSName", "IPAddress"]},
        },
        {
            "type": {"oid": "2.5.29.15"},
            "critical": True,
            "required": True,
            "inRequest": "optional",
            "keyUsage": {
                "usages": [
                    {"required": True, "value": "digitalSignature"},
                    {"required": False, "value": "keyEncipherment"},
                ]
            },
        },
        {
            "type": {"oid": "2.5.29.37"},
            "required": True,
            "inRequest": "optional",
            "extendedKeyUsage": {
                "usages": [
                    {"required": True, "oid": "1.3.6.1.5.5.7.3.1"},
                    {"required": False, "oid": "1.3.6.1.5.5.7.3.2"},
                ]
            },
        },
    ]
    return {
        "version": "v3",
        "certDomain": "RFC5280",
        "certLevel": "EndEntity",
        "maxSize": 4500,
        "validity": f"{days}d",
        "notBeforeTime": "current",
        "signatureAlgorithms": ["SHA256withECDSA"],
        "keyAlgorithms": keys,
        "subject": {"rdns": rdns},
        "subjectToSubjectAltNames": [{"source": {"oid": "2.5.4.3"}, "target": "DNSName"}],
        "extensions": extensions,
    }


class Xipki(JavaServer):
    """XiPKI's CA behind its CMP gateway. `confirm`: it wants certConf; `chain`: it sends the issuers."""

    program = "XipkiCa"
    ref, secret = "acme", "the secret of XiPKI"

    def __init__(self, directory: Path, *, confirm: bool = False, chain: bool = True) -> None:
        super().__init__(directory)
        self.pki = pki = Pki(directory)
        self.ports = {name: free_port() for name in ("http", "tls", "mutual", "ca")}
        pki.make("root", "XiPKI Root", ca=True)
        pki.make("sub", "XiPKI Issuing CA", "root", ca=True)
        pki.make("cmp", "XiPKI CMP Signer", "sub")
        pki.make("tls", "localhost", "sub")
        pki.make("gateway", "XiPKI Gateway", "sub")
        client_identities(pki)
        pki.trust("tls-trusted", "clients-root", "sub")
        self.trusted = pki.trust("trusted", "sub")
        self._configure_ca()
        self._configure_gateway(confirm=confirm, chain=chain)
        properties(
            directory / "xipki.properties",
            ref=self.ref,
            secret=self.secret,
            ras="ra-ec.pem,ra-rsa.pem,no-rights.pem,gateway.pem",
            **{f"port__{name}": port for name, port in self.ports.items()},
        )

    def arguments(self) -> list[str]:
        quiet = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
        return [f"-DXIPKI_BASE={self.directory}", quiet, "XipkiCa", str(self.directory / "xipki.properties")]

    def options(self, authentication: str = "secret", path: str = "cmp/acme/tls") -> dict[str, str]:
        """The section that fits: "secret", or the name of an RA certificate."""
        options = {
            "cmp_server": f"127.0.0.1:{self.ports['http']}",
            "cmp_path": path,
            "cmp_cmd": "p10cr",
            "cmp_recipient": "C=DE, O=Acme, CN=XiPKI CMP Signer",
            "cmp_digest": "sha256",
            "cmp_mac": "hmacWithSHA256",
            "cmp_trusted": str(self.trusted),  # XiPKI signs its answers, to a shared secret too
            "cmp_expect_sender": "C=DE, O=Acme, CN=XiPKI CMP Signer",
            **PATIENCE,
        }
        if authentication == "secret":
            options.update(cmp_ref=self.ref, cmp_secret=self.secret)
        else:
            del options["cmp_mac"]
            name = f"{self.directory}/{authentication}"
            options.update(cmp_cert=f"{name}.pem", cmp_key=f"{name}.key")
        return options

    def upstream(self) -> Upstream:
        """For an RA before it."""
        file = self.directory.joinpath
        url, name = f"http://127.0.0.1:{self.ports['http']}/cmp", "/C=DE/O=Acme/CN=XiPKI CMP Signer"
        return Upstream(url, name, [file("sub.pem"), file("root.pem")], file("ra-ec.pem"), file("ra-ec.key"))

    def tls(self, *, mutual: bool) -> dict[str, str]:
        """What changes for TLS, with or without a client's certificate."""
        return tls_options(self.directory, self.ports["mutual" if mutual else "tls"], "root", mutual=mutual)

    def _file(self, name: str) -> dict[str, str]:
        return {"file": str(self.directory / name)}

    def _write(self, name: str, content: dict[str, Any]) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2))

    def _configure_ca(self) -> None:
        databases = []
        for name in ("ca", "caconf"):
            lines = ["dataSourceClassName=org.h2.jdbcx.JdbcDataSource", f"dataSource.url=jdbc:h2:mem:{name}"]
            lines += ["dataSource.user=sa", "dataSource.password=", "maximumPoolSize=20"]
            (self.directory / f"{name}-db.properties").write_text("\n".join([*lines, ""]))
            databases.append({"name": name, "conf": self._file(f"{name}-db.properties")})
        security = {"defaultSignerParallelism": 8, "signerFactories": []}
        audit = {"type": "noop"}
        server = {"master": True, "noLock": True, "shardId": 0, "datasources": databases}
        self._write("etc/ca/ca.json", {**server, "security": security, "audit": audit})
        signer = f"algo=SHA256withECDSA,password={PASSWORD},keystore=file:{self.directory}/sub.p12"
        authority = {
            "name": "acme",
            "caInfo": {
                "cert": {"file": "sub.der"},
                "certchain": [{"file": "root.der"}],
                "caUris": {},
                "expirationPeriod": 365,
                "keepExpiredCertDays": -1,
                "maxValidity": "10y",
                "nextCrlNo": 1,
                "permissions": ["all"],
                "saveCert": True,
                "saveKeypair": False,
                "signerType": "pkcs12",
                "signerConf": {"value": signer},
                "snSize": 20,
                "status": "active",
                "validityMode": "cutoff",
            },
            "profiles": ["tls", "short", "secret-profile"],
            "requestors": [{"requestorName": "gateway", "permissions": ["all"], "profiles": ["all"]}],
        }
        profiles = {"tls": tls_profile(days=90), "short": tls_profile(days=7), "secret-profile": tls_profile(days=1)}
        conf = {
            "requestors": [{"name": "gateway", "type": "cert", "binaryConf": {"file": "gateway.der"}}],
            "profiles": [{"name": n, "type": "xijson", "conf": {"value": json.dumps(p)}} for n, p in profiles.items()],
            "cas": [authority],
        }
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("caconf.json", json.dumps(conf))
            for name in ("root", "sub", "gateway"):
                der = self.pki.made[name][1][0].public_bytes(serialization.Encoding.DER)
                file.writestr(f"{name}.der", der)
        (self.directory / "caconf.zip").write_bytes(archive.getvalue())

    def _configure_gateway(self, *, confirm: bool, chain: bool) -> None:
        signer = f"password={PASSWORD},keystore=file:{self.directory}/cmp.p12,algo=SHA256withECDSA"
        ssl = {
            "storeType": "pkcs12",
            "keystorePassword": PASSWORD,
            "keystore": self._file("gateway.p12"),
            "trustanchors": [self._file("root.pem")],
            "hostnameVerifier": "no_op",
        }
        gateway = {
            "cmp": {
                "confirmCert": confirm,
                "sendCaCert": chain,
                "sendCertChain": chain,
                "messageTimeRequired": True,
                "sendResponderCert": True,
                "messageTimeBias": 300,
                "confirmWaitTime": 300,
                "requestSigAlgos": ["SHA256withRSA", "SHA256withECDSA"],
                "requestPbmMacs": ["HMAC-SHA256"],
                "requestPbmOwfs": ["SHA256"],
                "responsePbmMac": "HMAC-SHA256",
                "responsePbmOwf": "SHA256",
                "responsePbmIterationCount": 10240,
            },
            "logReqResp": False,
            "authenticator": "XipkiCa$Requestors",
            "pop": {"sigAlgos": ["SHA256withRSA", "SHA256withECDSA", "SHA384withECDSA", "ED25519"]},
            "sdkClient": {"serverUrl": f"https://127.0.0.1:{self.ports['ca']}/ca/ra/", "ssl": ssl},
            "audit": {"type": "noop"},
            "signers": {"default": {"type": "pkcs12", "conf": signer}},
            "security": {"defaultSignerParallelism": 8, "signerFactories": []},
        }
        self._write("etc/cmp-gateway.json", gateway)
