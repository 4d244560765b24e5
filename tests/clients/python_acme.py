"""Python's acme at work: URL DIRECTORY order KEY CHAIN NAME... | URL DIRECTORY revoke CHAIN REASON"""

from __future__ import annotations

import datetime
import ipaddress
import sys
from pathlib import Path

from acme import client, crypto_util, errors, messages
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from josepy.jwa import ES256
from josepy.jwk import JWKEC

REASONS = {"keyCompromise": 1, "superseded": 4}
PATIENCE = datetime.timedelta(seconds=100)


def new_key(kind: str) -> bytes:
    """A private key in a PEM block."""
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey = ec.generate_private_key(ec.SECP256R1())
    if kind == "rsa":
        key = rsa.generate_private_key(65537, 2048)
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def session(url: str, directory: Path) -> client.ClientV2:
    """A client with its account, which is made at the first call."""
    kept = directory / "account.pem"
    if not kept.exists():
        kept.write_bytes(new_key("ec"))
    network = client.ClientNetwork(JWKEC.load(kept.read_bytes()), alg=ES256)
    acme = client.ClientV2(client.ClientV2.get_directory(url, network), network)
    try:
        acme.new_account(messages.NewRegistration.from_data(email="admin@example.com", terms_of_service_agreed=True))
    except errors.ConflictError as known:
        network.account = messages.RegistrationResource(body=messages.Registration(), uri=known.location)
    return acme


def order(acme: client.ClientV2, kind: str, chain: Path, names: list[str]) -> None:
    """A certificate for these names and addresses."""
    hosts, addresses = [], []
    for name in names:
        try:
            addresses.append(ipaddress.ip_address(name))
        except ValueError:
            hosts.append(name)
    placed = acme.new_order(crypto_util.make_csr(new_key(kind), hosts, ipaddrs=addresses))
    for authorization in placed.authorizations:
        if authorization.body.status == messages.STATUS_PENDING:
            challenge = authorization.body.challenges[0]
            acme.answer_challenge(challenge, challenge.response(acme.net.key))
    issued = acme.poll_and_finalize(placed, datetime.datetime.now() + PATIENCE)
    chain.write_text(issued.fullchain_pem)


def main(url: str, directory: str, action: str, *rest: str) -> None:
    """Order or revoke."""
    acme = session(url, Path(directory))
    if action == "order":
        order(acme, rest[0], Path(rest[1]), list(rest[2:]))
    else:
        leaf = x509.load_pem_x509_certificate(Path(rest[0]).read_bytes())
        acme.revoke(leaf, REASONS[rest[1]])


if __name__ == "__main__":
    main(*sys.argv[1:])
