"""The whole way works: certbot, acme2certifier, the handler, Siemens' RA, and behind it the demo CA or XiPKI."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography import x509

from conftest import OPENSSL, bundle_certificates, csr_pem
from demo_ca import DemoCA
from host import HANDLER, Host
from servers.javaservers import SiemensRa, Xipki, demo_upstream

pytestmark = pytest.mark.e2e


def leaf_of(chain: Path, root: Path) -> x509.Certificate:
    """What certbot has got, once its chain is verified."""
    command = [OPENSSL, "verify", "-CAfile", str(root), "-untrusted", str(chain), str(chain)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    leaf, issuer, *_ = bundle_certificates(chain.read_text())
    leaf.verify_directly_issued_by(issuer)
    return leaf


def test_certbot_orders_renews_and_revokes_at_the_demo_ca(tmp_path: Path) -> None:
    """Order, renewal, revocation."""
    with DemoCA(tmp_path / "ca") as ca, SiemensRa(tmp_path / "ra", demo_upstream(ca)) as ra:
        section = {"handler_module": str(HANDLER), **ra.options("signed")}
        root = ca.directory / "root.pem"
        with Host(tmp_path, section) as host:
            ordered = host.certbot("certonly", "-d", "www.example.com", "-d", "example.com")
            assert ordered.returncode == 0, ordered.stdout + host.log() + ra.log()
            first = leaf_of(host.certbot_chain("www.example.com"), root)
            renewed = host.certbot("renew", "--force-renewal", "--no-random-sleep-on-renew")
            assert renewed.returncode == 0, renewed.stdout + host.log() + ra.log()
            second = leaf_of(host.certbot_chain("www.example.com"), root)
            assert second.serial_number != first.serial_number
            options = ("--cert-name", "www.example.com", "--reason", "superseded", "--no-delete-after-revoke")
            revoked = host.certbot("revoke", *options)
            assert revoked.returncode == 0, revoked.stdout + host.log() + ra.log()
            assert ca.is_revoked(f"{second.serial_number:X}") and not ca.is_revoked(f"{first.serial_number:X}")
        assert list(host.work.iterdir()) == []


def test_certbot_orders_at_xipki(tmp_path: Path) -> None:
    """The RA hands XiPKI a PKCS #10 request, for it takes no CMP answer from it: docs/cmp-servers.md.

    The CSR of certbot's own has no CN, and Java refuses a certificate without a subject; so certbot gets a CSR to send.
    """
    csr, chain = tmp_path / "www.csr", tmp_path / "www.pem"
    csr.write_text(csr_pem(["www.example.com", "example.com"], "www.example.com"))
    with Xipki(tmp_path / "xipki") as ca, SiemensRa(tmp_path / "ra", ca.upstream()) as ra:
        section = {"handler_module": str(HANDLER), **ra.options("p10/acme/tls"), "cmp_cmd": "p10cr"}
        with Host(tmp_path, section) as host:
            files: list[str | Path] = ["--fullchain-path", chain, "--chain-path", tmp_path / "issuers.pem"]
            ordered = host.certbot("certonly", "--csr", csr, "--cert-path", tmp_path / "leaf.pem", *files)
            assert ordered.returncode == 0, ordered.stdout + host.log() + ra.log() + ca.log()
            leaf = leaf_of(chain, ca.directory / "root.pem")
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert sorted(names.get_values_for_type(x509.DNSName)) == ["example.com", "www.example.com"]
            assert "chain=3" in host.log('certificate issued: subject="CN=www.example.com"')
        assert list(host.work.iterdir()) == []
