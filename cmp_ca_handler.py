#!/usr/bin/env python3
"""CA handler for acme2certifier that talks CMP to any certificate authority.

    ACME client --ACME--> acme2certifier --enroll(csr)--> this file --runs--> openssl cmp --CMP--> CA
                                         <-(error, bundle, cert, poll id)-            <- certificate, chain

acme2certifier loads `CAhandler` from this file. Every key `cmp_X: value` of its `[CAhandler]`
section becomes `-X value` of an `openssl cmp` command line. OpenSSL does all of the CMP (RFC 4210, 9480,
9483, 9810) and all of the cryptography; this file decides what to send, keeps secrets out of sight, and makes
errors readable. It needs nothing but the standard library. Run it for the command line:
`python3 cmp_ca_handler.py --help`.

It is to be read before it is trusted with the credentials of a CA, from top to bottom: which keys there are, then
`CAhandler`, the story, and after it what the story calls, in the order in which it calls it. Each section begins
with a line `# --- `: acme2certifier, the configuration, the request, the transaction on the disk, the exchange with
the CA and its verdict, the chain, openssl as a process, DER, what differs between systems, the command line.

SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):  # noqa: UP036 - before an older one fails with what no administrator understands
    raise ImportError(f"cmp_ca_handler needs Python 3.9 or later, this is {sys.version.split()[0]}")

import base64
import binascii
import contextlib
import errno
import functools
import importlib
import io
import logging
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import time
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import IO, Any, Callable, NamedTuple, Optional

if sys.platform == "win32":  # mypy takes this very test for what it is
    import ctypes
    import msvcrt
else:
    import fcntl

__all__ = ["CAhandler"]
__version__ = "1.0.0"

# --- Which keys are whose -----------------------------------------------------------------------------------


def _keys(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Keys that are no openssl options. Of a new one, `_is_option` checks the value, and Settings and `_settings` hold it;
# profiles cannot set it, and docs/configuration.md describes it.
OUR_KEYS = _keys("openssl_bin tmp_dir ref_variable secret_variable san_types refuse_changes")
# Set by the handler for each transaction: ignored in the configuration, with a warning.
RUNTIME_KEYS = _keys(
    "newkey newkeypass csr sans san_nodefault extracertsout cacertsout certout chainout rspin rspout oldcert"
    " revreason batch certform"
)
# These turn openssl into a server, a help text or something else that is no enrolment.
FORBIDDEN_KEYS = _keys(
    "help port max_msgs srv_ref srv_secret srv_cert srv_key srv_keypass srv_trusted srv_untrusted ref_cert rsp_cert"
    " rsp_key rsp_keypass rsp_extracerts rsp_capubs rsp_crl rsp_newwithnew rsp_newwithold rsp_oldwithnew poll_count"
    " check_after grant_implicitconf pkistatus failure failurebits statusstring send_error send_unprotected"
    " send_unprot_err accept_unprotected accept_unprot_err accept_raverified use_mock_srv repeat reqin reqin_new_tid"
    " reqout_only centralkeygen newkeyout infotype template serial keyspec oldwithold newwithnew newwithold oldwithnew"
    " crlcert oldcrl crlout crlform"
)
UNUSABLE_KEYS = RUNTIME_KEYS | FORBIDDEN_KEYS
# Passed to openssl in its environment, for any local user can read an argument list.
SECRET_KEYS = _keys("secret keypass tls_keypass otherpass")
DN_KEYS = _keys("recipient issuer expect_sender subject")
FILE_KEYS = _keys("cert key srvcert tls_cert tls_key config")
FILE_LIST_KEYS = _keys("trusted untrusted out_trusted own_trusted extracerts tls_extra tls_trusted")
TLS_KEYS = _keys("tls_cert tls_key tls_keypass tls_extra tls_trusted tls_host")
ON, OFF = ("true", "yes", "on"), ("false", "no", "off")
NUMBER_KEYS = _keys("days keep_alive verbosity verify_depth auth_level attime")
# The names that `openssl cmp` takes: OBJ_ln2nid() knows no other spelling.
CHOICES = {
    "cmd": _keys("ir cr p10cr"),
    "popo": _keys("-1 0"),
    "mac": _keys("hmac-sha1 hmac-md5 hmacWithSHA1 hmacWithSHA224 hmacWithSHA256 hmacWithSHA384 hmacWithSHA512"),
    "digest": _keys(
        "sha1 sha224 sha256 sha384 sha512 sha512-224 sha512-256 sha3-224 sha3-256 sha3-384 sha3-512 md5 sm3 shake128"
        " shake256 blake2b512 blake2s256 ripemd160"
    ),
    "keyform": _keys("PEM P12 pem p12"),
}
CHOICE_HINTS = {
    "cmd": "only ir, cr and p10cr enrol a certificate",
    "popo": "only 0 (raVerified) and -1 (none) are possible: the private key stays with the ACME client",
    "keyform": "openssl applies it to the public key of the request, too, and fails: delete it; for an engine write"
    " cmp_key: org.openssl.engine:pkcs11:pkcs11:...",
}
WEAK_KEYS = {
    "unprotected_errors": "anybody on the way to the CA can refuse in its name",
    "unprotected_requests": "the requests are not protected, so only TLS can tell the CA who sends them",
    "ta_in_ip_extracerts": "whoever is on the way can answer as the CA, in spite of cmp_trusted",
    "no_check_time": "expired certificates are believed",
    "ignore_critical": "what a certificate forbids may be overlooked",
    "allow_proxy_certs": "whoever has a certificate can make more of them",
}
# What only an enrolment knows: not part of a revocation request.
ENROLMENT_KEYS = _keys(
    "popo subject issuer days reqexts policies policy_oids policy_oids_critical out_trusted implicit_confirm"
    " disable_confirm profile"
)
# A profile that belongs to an ACME client's account may set what the configuration uses, but none of these: the
# program and what it loads, the files it writes, the credentials, and how long it may keep a worker busy.
PROTECTED_KEYS = OUR_KEYS | RUNTIME_KEYS | FORBIDDEN_KEYS | SECRET_KEYS
PROTECTED_KEYS |= _keys(
    "ref cert key keyform cmd popo config section engine provider provider-path provparam propquery tls_cert tls_key"
    " rand writerand reqout srvcertout msg_timeout total_timeout unprotected_requests unprotected_errors"
    " verbosity tls_used"
)
PROTECTED_KEYS |= frozenset(WEAK_KEYS)
MSG_TIMEOUT, TOTAL_TIMEOUT = 5, 10  # seconds
# cmpossl before 2020 spells many options without the underscore: inside this file each has OpenSSL 3's name.
OPTION_NAMES = PROTECTED_KEYS | ENROLMENT_KEYS | DN_KEYS | FILE_KEYS | FILE_LIST_KEYS
OPTION_NAMES |= _keys("tls_used tls_host no_proxy keep_alive ignore_keyusage")
WITHOUT_UNDERSCORES = {name.replace("_", ""): name for name in OPTION_NAMES}


def _option_name(option: str, known: Iterable[str] = ()) -> str:
    """`option` under the name that this file, or else the openssl that has the options `known`, has for it."""
    plain = option.replace("_", "")
    return WITHOUT_UNDERSCORES.get(plain) or next((name for name in known if name.replace("_", "") == plain), option)


def _key(key: str) -> str:
    """A key of the section under the name that this file has for it: `cmp_tmpdir` is `cmp_tmp_dir`."""
    return "cmp_" + _option_name(key[4:]) if key.startswith("cmp_") else key


# RFC 5280, 5.3.1, in the order of their numbers; 7 is not used.
REASONS = dict(
    zip(
        "unspecified keyCompromise cACompromise affiliationChanged superseded cessationOfOperation certificateHold"
        " removeFromCRL privilegeWithdrawn aACompromise".split(),
        (0, 1, 2, 3, 4, 5, 6, 8, 9, 10),
    )
)

# Attribute type -> (openssl's short name, the string tag that openssl encodes it with, longest value). A subject
# made of these alone survives the way through `-subject` byte for byte; any other is left to `-csr`.
PRINTABLE, IA5, UTF8 = 0x13, 0x16, 0x0C
ATTRIBUTES = {
    "2.5.4.3": ("CN", UTF8, 64),
    "2.5.4.4": ("SN", UTF8, 32768),
    "2.5.4.5": ("serialNumber", PRINTABLE, 64),
    "2.5.4.6": ("C", PRINTABLE, 2),
    "2.5.4.7": ("L", UTF8, 128),
    "2.5.4.8": ("ST", UTF8, 128),
    "2.5.4.9": ("street", UTF8, 128),
    "2.5.4.10": ("O", UTF8, 64),
    "2.5.4.11": ("OU", UTF8, 64),
    "2.5.4.12": ("title", UTF8, 64),
    "2.5.4.42": ("GN", UTF8, 32768),
    "1.2.840.113549.1.9.1": ("emailAddress", IA5, 128),
    "0.9.2342.19200300.100.1.1": ("UID", UTF8, 256),
    "0.9.2342.19200300.100.1.25": ("DC", IA5, 255),
}
# What openssl takes in the value of an attribute type: characters, and how many. All others are any text (UTF8String).
PRINTABLE_TEXT, ASCII_TEXT, DIGITS = r"[A-Za-z0-9 '()+,./:=?-]*", r"[\0-\x7f]*", r"[0-9 ]*"
ANY_TEXT = (UTF8, "(?s:.*)", 1, 1 << 17)
DN_VALUES = {
    **dict.fromkeys(("C", "jurisdictionC"), (PRINTABLE, PRINTABLE_TEXT, 2, 2)),
    "c3": (PRINTABLE, PRINTABLE_TEXT, 3, 3),
    "serialNumber": (PRINTABLE, PRINTABLE_TEXT, 1, 64),
    "dnQualifier": (PRINTABLE, PRINTABLE_TEXT, 1, 1 << 17),
    **dict.fromkeys(("CN", "O", "OU"), (UTF8, "(?s:.*)", 1, 64)),
    **dict.fromkeys(("L", "ST"), (UTF8, "(?s:.*)", 1, 128)),
    **dict.fromkeys(("GN", "SN", "initials", "name"), (UTF8, "(?s:.*)", 1, 32768)),
    "emailAddress": (IA5, ASCII_TEXT, 1, 128),
    "mail": (IA5, ASCII_TEXT, 1, 256),
    "DC": (IA5, ASCII_TEXT, 1, 1 << 17),
    **{name: (0x12, DIGITS, size, size) for name, size in (("n3", 3), ("INN", 12), ("OGRN", 13), ("SNILS", 11))},
    **dict.fromkeys(("friendlyName", "CSPName"), (0x1E, r"[\0-\uffff]*", 1, 1 << 17)),
}
# What others call the types that openssl calls so; case does not count.
DN_ALIASES = dict(
    pair.split("=")
    for pair in (
        "E=emailAddress EMAIL=emailAddress MAIL=mail S=ST SP=ST T=title G=GN I=initials DNQ=dnQualifier"
        " GENERATION=generationQualifier PHONE=telephoneNumber POBOX=postOfficeBox JURISDICTIONCOUNTRY=jurisdictionC"
        " JURISDICTIONSTATE=jurisdictionST JURISDICTIONLOCALITY=jurisdictionL"
    ).split()
)
STRINGS = {UTF8: "utf-8", PRINTABLE: "ascii", IA5: "ascii", 0x12: "ascii", 0x1A: "ascii", 0x14: "latin-1"}
STRINGS.update({0x1E: "utf-16-be", 0x1C: "utf-32-be"})

SUBJECT_KEY_ID, SUBJECT_ALT_NAME, AUTHORITY_KEY_ID = "2.5.29.14", "2.5.29.17", "2.5.29.35"
KEY_USAGE, BASIC_CONSTRAINTS = "2.5.29.15", "2.5.29.19"

# PKIBody, RFC 4210 section 5.1.2: the tags of a CA's answers, and of the request that confirms a certificate.
IP, CP, RP, PKICONF, ERROR, CERTCONF, POLLREP = 1, 3, 12, 19, 23, 24, 26
# PKIStatus, 5.2.3. With GOOD comes a certificate, in spite of the two warnings; GRANTED says a certConf that takes it.
GRANTED, WAITING, GOOD = (0, 1), 3, (0, 1, 4, 5)
# PKIFailureInfo, 5.2.3, in the order of the bits.
FAILURES = (
    "badAlg badMessageCheck badRequest badTime badCertId badDataFormat wrongAuthority incorrectData missingTimeStamp"
    " badPOP certRevoked certConfirmed wrongIntegrity badRecipientNonce timeNotAvailable unacceptedPolicy"
    " unacceptedExtension addInfoNotAvailable badSenderNonce badCertTemplate signerNotTrusted transactionIdInUse"
    " unsupportedVersion notAuthorized systemUnavail systemFailure duplicateCertReq"
).split()

MAX_DER = 1 << 17  # no CSR or certificate is larger, even with post-quantum signatures; openssl's limit is 100 kB
MAX_OUTPUT = 1 << 18  # of openssl's messages
MAX_MESSAGES = 400  # of one run of openssl in the log
MAX_TEXT = 300  # characters of an error: it becomes a log line and an ACME problem
MAX_RESPONSES = 200  # that one run of openssl can save
NO_TIMEOUT = 30  # seconds for openssl where it is told of no time-out
EXPIRES_SOON = 30 * 86400  # seconds
GRACE = 5  # seconds that openssl may take beyond -total_timeout before it is killed
TICK = 0.2  # seconds between two looks at what openssl has saved, where it prints nothing
SHORT_CHECK_AFTER = 5  # seconds of checkAfter that a poll sleeps, rather than have too little time for the answer
KEPT = 24 * 3600  # seconds for which the result of a poll is kept
MAX_CHAIN = 10
MAX_LINKS = 24  # processes for the links of one chain
MAX_STEPS = 100  # on the ways up from a leaf, those that openssl has verified before included
FALSE_LINK = 4  # that many of them it costs when a certificate from extraCerts, which anybody may put there, is false
ABANDONED = 3600  # seconds after which the directory of an enrolment that was killed is swept


# --- The handler --------------------------------------------------------------------------------------------

Enrolled = tuple[Optional[str], Optional[str], Optional[str], Optional[str]]
Polled = tuple[Optional[str], Optional[str], Optional[str], Optional[str], bool]
Revoked = tuple[int, Optional[str], Optional[str]]
ACME_ERROR = "urn:ietf:params:acme:error:"
_warned: set[str] = set()


class CMPError(Exception):
    """What went wrong, on one line, in words for the administrator."""


class Log(logging.Logger):
    """acme2certifier's logger. A log handler that raises does not cost the order that the line is about."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.name)
        self.parent = self.inner = logger

    def isEnabledFor(self, level: int) -> bool:
        """As the logger behind it."""
        return self.inner.isEnabledFor(level)

    def handle(self, record: logging.LogRecord) -> None:
        """Hand the record on."""
        with contextlib.suppress(Exception):
            self.inner.handle(record)


class CAhandler:
    """What acme2certifier calls: a context manager, made anew for each call.

    No method lets an exception out: a failure is a log line and an error value.
    """

    profile_mapping_field = "cmp_profile"

    def __init__(self, debug: bool | None = None, logger: logging.Logger | None = None) -> None:
        self.logger: logging.Logger = Log(logger or logging.getLogger("cmp_ca_handler"))
        self.cahandler_registry_name: str | None = None  # set by acme2certifier where it has several CAs
        self._helper: types.ModuleType | None = None
        self._config: Any = {}
        self.section: dict[str, str] = {}
        self.config_error = ""
        self._hidden: Collection[str] = ()
        self.ask_always = False  # poll() asks the CA even before its checkAfter has passed: for the command line

    def __enter__(self) -> CAhandler:
        """Read the configuration. Starts no process, leaves nothing on disk: each GET of the directory does this."""
        try:
            self._helper = _acme2certifier_helper()
            self._config = _load_config(self._helper, self.logger)
            if "CAhandler" not in self._config:
                raise CMPError("the configuration has no [CAhandler] section")
            self.section = _our_keys(self._config["CAhandler"])
            _check_yaml(os.environ.get("ACME_SRV_CONFIGFILE") or "", self.section)
        except Exception as err:
            self.config_error = self._failure("configuration", err)
        return self

    def use_section(self, name: str) -> None:
        """Overlay `[CAhandler:<name>]`, for the command line: in acme2certifier its `load_config` does that."""
        if name != "CAhandler":
            if name not in self._config:
                raise CMPError(f"the configuration has no section [{_one_line(name)}]")
            self.section.update(_our_keys(self._config[name]))

    def __exit__(self, *args: object) -> None:
        """Nothing is open between calls."""

    def enroll(self, csr: str) -> Enrolled:
        """Get a certificate for a CSR (base64url DER, or PEM).

        Returns (error, bundle in PEM with the leaf first, leaf's DER in base64, poll identifier). A CA that has
        not decided yet gives (None, None, None, identifier).
        """
        what = "enrolment"
        try:
            section = self._profiled_section(csr)
            settings = self._checked(section)
            wanted = _csr(csr, settings.san_types)
            what = f"enrolment of {_wanted(wanted)}"
            self._check_seen(wanted)
            with closing(_begin(settings, self.logger)) as transaction:
                transaction.write("enrolling", "")
                changed = {key: value for key, value in section.items() if self.section.get(key) != value}
                if changed:
                    import json  # only for an order with a profile

                    transaction.write("profile", json.dumps(changed))
                try:
                    outcome, bundle, certificate = self._obtain(wanted, transaction)
                except BaseException as err:
                    # A fault of ours does not cost what the CA has answered: it may have issued the certificate.
                    transaction.keep = transaction.answered()
                    if not transaction.keep or not isinstance(err, Exception):
                        raise
                    outcome, bundle, certificate = Outcome(waiting=True, text=self._failure(what, err)), None, None
                if bundle:
                    return (None, bundle, certificate, None)
                about = f"{_wanted(wanted)}, CMP transaction {transaction.cmp_id or 'unknown'}"
                if not outcome.waiting:
                    what = f"enrolment of {about}"
                    raise CMPError(outcome.text)
                transaction.wait()
                text = outcome.text or "undecided"
                self.logger.info("CMP enrolment %s waits for the CA: %s (%s)", transaction.identifier, text, about)
                return (None, None, None, transaction.identifier)
        except Exception as err:
            return (self._failure(what, err), None, None, None)

    def poll(self, cert_name: str, poll_identifier: str, csr: str) -> Polled:
        """Go on with an enrolment that the CA had not decided.

        Returns (error, bundle, certificate, identifier, rejected). `rejected` is the CA's final no; a CA that
        cannot be reached is an error, and the next poll tries again.
        """
        what = "poll"
        try:
            settings = self._read(self._configured())  # its other errors do not count yet: there may be a result
            fault = _directory_fault(settings)
            if fault:
                raise CMPError(fault)
            _check_identifier(poll_identifier)
            what = f"poll of {poll_identifier}"
            kept = _kept_result(settings, poll_identifier)
            if kept:
                leaf = _certificate(_decode(kept[: kept.index("-----END") + 8], "CERTIFICATE"))
                if csr and not _same_key(_csr(csr, settings.san_types).key, leaf.key):
                    raise CMPError("its certificate is for another CSR")
                return (None, kept, base64.b64encode(leaf.der).decode(), poll_identifier, False)
            with closing(_resume(settings, poll_identifier, self.logger)) as transaction:
                transaction.keep = True
                wanted = _csr(transaction.read("csr.pem"), settings.san_types)
                what += f" ({_wanted(wanted)})"
                if csr and _decode(csr, CSR_LABEL) != wanted.der:
                    raise CMPError("the transaction is for another CSR")
                answers = _usable(transaction.answers())
                if not answers:  # without them, openssl would begin a second transaction
                    raise CMPError(f"the saved answers in {transaction.path} are damaged: order the certificate again")
                if not self.ask_always and not _due(answers):
                    return (None, None, None, poll_identifier, False)
                saved = _saved_profile(transaction, self._profile_keys())
                transaction.settings = self._checked({**self.section, **saved})
                outcome, bundle, certificate = self._obtain(wanted, transaction)
                if outcome.text:
                    about = f"{_wanted(wanted)}, CMP transaction {transaction.cmp_id}"
                    self.logger.error("CMP poll of %s (%s): %s", poll_identifier, about, outcome.text)
                transaction.keep = not bundle and not outcome.final
                return (outcome.text or None, bundle, certificate, poll_identifier, outcome.final)
        except Exception as err:
            return (self._failure(what, err), None, None, poll_identifier, False)

    def revoke(self, cert: str, rev_reason: str | None = None, rev_date: str | None = None) -> Revoked:
        """Revoke a certificate (base64url DER, or PEM) for a reason of RFC 5280, 5.3.1, by name or number.

        Returns (200, None, None) or (HTTP status, ACME error type, detail). CMP dates a revocation itself.
        """
        try:
            code = str(rev_reason).strip() if rev_reason is not None else "unspecified"
            number = {**REASONS, **{str(number): number for number in REASONS.values()}}.get(code)
            if number is None:
                detail = self._failure("revocation", CMPError(f"unknown revocation reason {_one_line(code, 40)}"))
                return (400, ACME_ERROR + "badRevocationReason", detail)
            try:
                parsed = _certificate(_decode(cert, "CERTIFICATE"))
            except CMPError as err:
                detail = self._failure("revocation", CMPError(f"not a certificate: {err}"))
                return (400, ACME_ERROR + "malformed", detail)
            return self._revoke(parsed, number, self._checked(self._profiled_section(cert, revocation=True)))
        except Exception as err:
            return (500, ACME_ERROR + "serverInternal", self._failure("revocation", err))

    def _revoke(self, certificate: Certificate, number: int, settings: Settings) -> Revoked:
        """Ask the CA to revoke, with the server and the credentials of `settings`."""
        settings = settings.without_enrolment("rr")
        with closing(_begin(settings, self.logger)) as transaction:
            transaction.write("old.pem", _pem(certificate.der))
            arguments = ["-oldcert", transaction.file("old.pem"), "-revreason", str(number)]
            if "rspout" in settings.binary.options:
                arguments += ["-rspout", ",".join(transaction.file(f"{number:03d}.new") for number in range(1, 10))]
            run = _openssl_cmp(transaction, arguments)
            newest = next(reversed(transaction.answers()), None)
        _log_messages(self.logger, run.messages)
        what = f"serial={certificate.serial} issuer={_name_text(certificate.issuer)}"
        if run.code == 0 and not run.errors():
            code = next(name for name, known in REASONS.items() if known == number)
            self.logger.info("revoked at CMP server %s: %s reason=%s", settings.server, what, code)
            return (200, None, None)
        detail = _failure_text(run, newest, settings)
        self.logger.error("CMP revocation failed: %s: %s", what, detail)
        # Not from an error message: there it may mean the certificate that has signed the request.
        revoked = newest is not None and newest.body == RP and newest.protected and "certRevoked" in newest.failures
        if revoked and run.only(AFTER_ACCEPTANCE):
            return (400, ACME_ERROR + "alreadyRevoked", detail)
        return (500, ACME_ERROR + "serverInternal", detail)

    def trigger(self, payload: str) -> tuple[str, None, None]:
        """CMP has no callbacks."""
        return ("Method not implemented.", None, None)

    def handler_check(self) -> str | None:
        """None, or every fault of the configuration on one line. Does not contact the CA."""
        try:
            faults = [self.config_error] if self.config_error else self._read(self.section).errors
            return _one_line("; ".join(faults), 4 * MAX_TEXT) or None
        except Exception as err:
            return self._failure("check", err)

    def _obtain(self, csr: CSR, transaction: Transaction) -> tuple[Outcome, str | None, str | None]:
        """Begin or resume the exchange; where that gets a certificate: bundle and leaf, and the log line about them."""
        _prove_possession(csr, transaction)
        outcome = _exchange(_request(csr, transaction), csr.key, transaction)
        if outcome.leaf is None:
            return outcome, None, None
        leaf = outcome.leaf
        names = f"subject={_name_text(leaf.subject)} serial={leaf.serial} issuer={_name_text(leaf.issuer)}"
        changes = _changes(csr, leaf, transaction.read("subject"))
        if changes:
            self.logger.warning("the CA issued something else than the CSR asked for: %s: %s", names, changes)
            if transaction.settings.refuse_changes:
                return Outcome(text=self._refuse(leaf, changes, transaction), final=True), None, None
        chain = _chain(leaf, transaction)
        bundle = "".join(_pem(cert.der) for cert in chain)
        if os.path.exists(transaction.file("waiting")):
            transaction.finish(bundle)
        names += f" notAfter={leaf.not_after} chain={len(chain)} transaction={transaction.cmp_id or 'unknown'}"
        self.logger.info("certificate issued: %s seconds=%.2f", names, time.monotonic() - transaction.started)
        return outcome, bundle, base64.b64encode(leaf.der).decode()

    def _refuse(self, leaf: Certificate, changes: str, transaction: Transaction) -> str:
        """Revoke a certificate that nobody has asked for; the text for the error."""
        try:
            detail = self._revoke(leaf, REASONS["cessationOfOperation"], transaction.settings)[2]
        except (CMPError, OSError) as err:
            detail = self._failure("revocation", err)
        end = f"and could not be revoked ({detail}): revoke serial {leaf.serial} at the CA" if detail else "and revoked"
        return f"the CA issued something else than the CSR asked for ({changes}): refused {end}"

    def _check_seen(self, csr: CSR) -> None:
        """Ask acme2certifier how many names it reads in the CSR: it has checked no others. Raises CMPError."""
        read = getattr(self._helper, "csr_san_get", None)
        if read is not None:
            seen = len(read(self.logger, base64.urlsafe_b64encode(csr.der).decode().rstrip("=")))
            names = sum(kind in CHECKED_KINDS for kind, _ in _alternative_names(csr.extensions))
            if seen != names:
                raise CMPError(
                    f"acme2certifier reads {seen} of the CSR's {names} subjectAltNames: the others are not checked"
                )

    def _profile_keys(self) -> list[str]:
        """The keys that a profile may set: those that the configuration uses, without the protected ones."""
        keys = dict.fromkeys([*self.section, "cmp_profile"])
        return [key for key in keys if _option_name(key[4:]) not in PROTECTED_KEYS]

    def _configured(self) -> dict[str, str]:
        """The section. Raises CMPError where there is none that can be read."""
        if self.config_error:
            raise CMPError(self.config_error)
        return self.section

    def _profiled_section(self, argument: str, revocation: bool = False) -> dict[str, str]:
        """The section, with what the profile of the order, of its account or of its HTTP header sets."""
        check = getattr(self._helper, "eab_profile_header_info_check", None)
        if check is None or self.config_error:
            return self._configured()
        # acme2certifier sets attributes by `hasattr` and `setattr`: let it find only what a profile may set.
        chosen = types.SimpleNamespace(**{key: self.section.get(key) for key in self._profile_keys()})
        chosen.cahandler_registry_name = self.cahandler_registry_name
        chosen.eab_profiling, chosen.eab_handler = self._read_by_helper("config_eab_profile_load", (False, None))
        if revocation:
            check_revocation = getattr(self._helper, "eab_profile_revocation_check", None)
            if check_revocation and chosen.eab_profiling and chosen.eab_handler:
                check_revocation(self.logger, chosen, argument)
        else:
            chosen.header_info_field = self._read_by_helper("config_headerinfo_load", None)
            chosen.profiles = self._read_by_helper("config_profile_load", {})
            error = check(self.logger, chosen, argument, self.profile_mapping_field)
            if error:
                raise CMPError(_one_line(str(error)))
            if chosen.header_info_field and not chosen.eab_profiling and not chosen.profiles:
                self._check_header_value(chosen)
        values = {key: getattr(chosen, key, None) for key in self._profile_keys()}
        return {**self.section, **{key: value for key, value in values.items() if isinstance(value, str)}}

    def _check_header_value(self, chosen: types.SimpleNamespace) -> None:
        """Undo what an HTTP header has set, unless [Order] allowed_header_values has it: before 0.46 nobody looks."""
        import json  # only where [Order] has a header_info_list

        field = self.profile_mapping_field
        try:
            allowed = json.loads(self._config["Order"]["allowed_header_values"])
        except (KeyError, ValueError, TypeError, RecursionError):
            allowed = []
        value, configured = getattr(chosen, field), self.section.get(field)
        if value != configured and not (isinstance(allowed, list) and value in allowed):
            setattr(chosen, field, configured)
            what = f"{field}={_one_line(str(value), 100)} in an HTTP header ignored"
            self.logger.warning("%s: it is not in allowed_header_values of [Order]", what)

    def _read_by_helper(self, function: str, default: Any) -> Any:
        """What one of acme2certifier's functions reads from the configuration; old releases have not got them all."""
        load = getattr(self._helper, function, None)
        return load(self.logger, self._config) if load else default

    def _read(self, section: Mapping[str, str]) -> Settings:
        """The settings, with all that is wrong with them."""
        settings = _settings(section)
        self._hidden = settings.hidden
        return settings

    def _checked(self, section: Mapping[str, str]) -> Settings:
        """The settings. Raises CMPError, before anything is sent, with every error there is."""
        settings = self._read(section)
        for warning in settings.warnings:
            if warning not in _warned:  # once per process is enough
                _warned.add(warning)
                self.logger.warning("configuration: %s", warning)
        if settings.errors:
            raise CMPError("configuration error: " + "; ".join(settings.errors))
        return settings

    def _failure(self, what: str, err: Exception) -> str:
        """Log a failure and give its text."""
        if isinstance(err, CMPError):
            text = str(err)
        elif isinstance(err, OSError):
            text = f"{err.strerror or err}: {err.filename}" if err.filename else str(err.strerror or err)
            hint = OS_HINTS.get(err.errno or 0)  # by number: the system may speak any language
            text += f" ({hint})" if hint else ""
        else:
            import traceback  # hopefully never

            lines = [str(f.lineno) for f in traceback.extract_tb(err.__traceback__) if f.filename == __file__]
            kind = f"{type(err).__name__} {_foreign(str(err), self._hidden)}"
            text = f"internal error: {kind} (lines {', '.join(lines)})"
        text = _one_line(text, 4 * MAX_TEXT)
        self.logger.error("CMP %s failed: %s", what, text)
        return text


def _saved_profile(transaction: Transaction, allowed: Sequence[str]) -> dict[str, str]:
    """What the order's profile had set when the enrolment began."""
    import json

    try:
        profile = json.loads(transaction.read("profile") or "{}")
        return {key: str(value) for key, value in profile.items() if key in allowed}
    except (ValueError, AttributeError, RecursionError) as err:
        raise CMPError(f"the file {transaction.file('profile')} is damaged: order the certificate again") from err


# --- acme2certifier, old or new, or none ---------------------------------------------------------------------

HELPERS = ("acme2certifier.acme_srv.helper", "acme_srv.helper")  # since 0.45; up to 0.44


def _acme2certifier_helper() -> types.ModuleType | None:
    """acme2certifier's helper module: the one that runs this process, else one that can be imported, else None."""
    # import_module, for another thread may be in the middle of importing what sys.modules has.
    for name in sorted(HELPERS, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue  # not this release; without any, the configuration file is read below
    return None


def _load_config(helper: types.ModuleType | None, logger: logging.Logger) -> Any:
    """acme2certifier's configuration, a configparser object. Raises CMPError with what is wrong with the file."""
    path = os.environ.get("ACME_SRV_CONFIGFILE")
    if helper is None:
        if not path:
            raise CMPError("no configuration: ACME_SRV_CONFIGFILE names no file and acme2certifier is not installed")
        return _read_ini(path)
    try:  # it reads YAML too, and overlays the `[CAhandler:<name>]` section where there are several CAs
        return helper.load_config(logger, "CAhandler")
    except Exception as err:
        if path and _is_ini(path):
            _read_ini(path)  # says what is wrong: the helper says that it is no YAML either
        mark, what = getattr(err, "problem_mark", None), getattr(err, "problem", None) or str(err)
        if mark:  # YAML's message shows the line, or a word of it, which may be a secret
            what = f"line {mark.line + 1}: " + (what if "duplicate" in what else re.sub("'[^']*'", "'...'", what))
        raise CMPError(f"acme2certifier cannot read {path or 'its configuration'}: {_one_line(what)}") from None


def _check_yaml(path: str, section: Mapping[str, str]) -> None:
    """Raise CMPError where YAML has made another value of one: 0123 is 83 there, and 12:34 is 754."""
    if not os.path.isfile(path) or _is_ini(path):
        return
    with open(path, encoding="utf-8-sig") as file:
        written = re.findall(r"^\s+(cmp_\w+)\s*:[ \t]+([-+.\d][^\s#]*)[ \t]*(?:#.*)?$", file.read(), re.M)
    values = {key: {value for name, value in written if name == key} for key, _ in written}
    changed = [key for key in values.keys() & section.keys() if section[key] not in values[key]]
    changed = sorted(key for key in changed if re.fullmatch(r"[-+.\de]+|[-+]?inf|nan", section[key]))
    if changed:
        raise CMPError(f"{', '.join(changed)}: YAML reads another value there: write it in quotes")


def _is_ini(path: str) -> bool:
    """Whether the first line that says something begins a section, as acme2certifier tells INI and YAML apart."""
    with open(path, encoding="latin-1") as file:
        first = next((line for line in map(str.strip, file) if line and line[0] not in "#;"), "")
    return first.lstrip("\xef\xbb\xbf").startswith("[")


def _read_ini(path: str) -> Any:
    """The INI file as a configparser object. Raises CMPError with what is wrong with it."""
    import configparser  # only without acme2certifier

    config = configparser.ConfigParser(interpolation=None)
    config.optionxform = str  # type: ignore[assignment,method-assign]  # keep the case
    try:
        with open(path, encoding="utf-8-sig") as file:
            config.read_file(file)
    except configparser.MissingSectionHeaderError as err:  # it prints the line, which may hold a secret
        raise CMPError(f"cannot read {path}: no [section] before line {err.lineno}") from None
    except configparser.ParsingError as err:  # so does this one
        lines = ", ".join(str(number) for number, _ in err.errors)
        raise CMPError(f"cannot read {path}: no key and value in line {lines}") from None
    except (OSError, ValueError, configparser.Error) as err:
        what = "; save it in UTF-8" if isinstance(err, UnicodeDecodeError) else ""
        raise CMPError(f"cannot read {path}: {_one_line(str(err))}{what}") from err
    return config


# --- From the section to openssl's options ------------------------------------------------------------------


class Settings(NamedTuple):
    """The `[CAhandler]` section, read and checked."""

    binary: Binary
    directory: str
    own_directory: bool  # nobody configured it: a directory of ours under the system's temporary directory
    options: Mapping[str, str | None]  # openssl's option -> value; None for a bare flag
    secrets: Mapping[str, str]  # environment variables for openssl
    hidden: Collection[str]  # must appear nowhere: those secrets, and others that stand where they should not
    errors: Sequence[str]
    warnings: Sequence[str]
    refuse_changes: bool  # revoke a certificate that is not what was asked for
    san_types: Sequence[str]  # the kinds of subjectAltNames that a CSR may have

    @property
    def server(self) -> str:
        """Who answers, for messages."""
        return _one_line(self.options.get("server") or "the server in OpenSSL's configuration file", 100)

    @property
    def tls(self) -> bool:
        """Whether openssl uses TLS: since 3.5 it does so by itself for https://."""
        url = (self.options.get("server") or "").startswith("https://")
        return "tls_used" in self.options or (url and self.binary.since(3, 5))

    def seconds(self, name: str) -> int:
        """One of the two time-outs."""
        return int(self.options[name] or 0)

    def limit(self) -> int:
        """Seconds after which a run of openssl is ended. Its own time-out of 0 is none."""
        return self.seconds("total_timeout") + GRACE if self.seconds("total_timeout") else NO_TIMEOUT

    def without_enrolment(self, command: str) -> Settings:
        """For another command than an enrolment: the same server and credentials."""
        options = {option: value for option, value in self.options.items() if option not in ENROLMENT_KEYS}
        return self._replace(options={**options, "cmd": command})


FAULT, WARNING = "error", "warning"


class Finding(NamedTuple):
    """What is wrong with the configuration."""

    level: str  # a FAULT stops everything; a WARNING is logged once
    text: str


DN_SYNTAX = "is not a distinguished name such as C=DE, CN=Issuing CA"
DN_TYPE = re.compile(r"\s*([A-Za-z][\w.-]*|\d+(?:\.\d+)*)\s*=[ \t]*")
# RFC 4514, section 2.4: text in quotes (of its predecessors), the hexadecimal form, or text with escapes.
DN_VALUE = re.compile(r'"((?:[^"\\]|\\.)*)"|(#(?:[0-9A-Fa-f]{2})+)(?=\s*(?:[,+;]|$))|((?:[^,+;"\\]|\\.)*)', re.S)


class Part(NamedTuple):
    """An attribute of a configured name: what stands before it (`+` in a multi-valued RDN), type, value as written."""

    separator: str
    type: str
    value: str
    tag: int | None = None  # of the value's string, where it is written as `#hex`


def _split_slash(value: str) -> Iterator[Part]:
    """The attributes in openssl's notation `/C=DE/CN=x`: a backslash makes the next character a part of the value."""
    for separator, part in re.findall(r"([/+])((?:[^/+\\]|\\.)*)", value, re.S):
        kind, equals, text = part.partition("=")
        if part or separator == "+":
            if not equals:
                raise CMPError(f"'{_one_line(part, 60)}' is no attribute such as CN=x: {_escape_hint(separator)}")
            if re.search(r"(?<!\\)(?:\\\\)*\\\w", text):  # `\C3` and `\xC3` are of other notations: openssl reads C3
                raise CMPError(
                    f"{_one_line(kind, 60)}: write the character itself for its code, or \\\\ for a backslash"
                )
            yield Part(separator, kind.strip(), re.sub(r"\\(.)", r"\1", text, flags=re.S))
    if re.search(r"(?<!\\)(?:\\\\)*\\$", value):
        raise CMPError("ends in a backslash: write two for one")


def _escape_hint(separator: str) -> str:
    names = {"/": "slash", "+": "plus sign", ",": "comma"}
    return f"write \\{separator} for a {names[separator]} in a value"


def _split_rfc4514(value: str) -> Iterator[Part]:
    """The attributes in RFC 4514's notation `C=DE, CN=x`, from left to right as they are written."""
    position, separator = 0, "/"
    while True:
        kind = DN_TYPE.match(value, position)
        if not kind:
            rest = value[position:].strip().partition(",")[0]
            why = _escape_hint("," if separator == "/" else separator) if position else ""
            raise CMPError(f"'{_one_line(rest, 60)}' {DN_SYNTAX}{'; ' + why if why else ''}")
        found = DN_VALUE.match(value, kind.end())
        assert found is not None  # noqa: S101 - the last alternative matches anything
        rest = value[found.end() :].lstrip()
        if rest and rest[0] not in ",+":
            why = (
                f"write \\{rest[0]} for {rest[0]} in its value"
                if rest[0] in ';"\\'
                else "its value goes on after the quotes"
            )
            raise CMPError(f"{kind.group(1)}: {why}")
        yield _part(separator, kind.group(1), found)
        if not rest:
            return
        position, separator = len(value) - len(rest) + 1, "+" if rest[0] == "+" else "/"


def _part(separator: str, kind: str, found: re.Match[str]) -> Part:
    """One attribute out of RFC 4514's notation."""
    quoted, encoded, text = found.groups()
    if encoded:
        try:
            (element,) = _elements(bytes.fromhex(encoded[1:]))
            return Part(separator, kind, element.value.decode(STRINGS[element.tag]), element.tag)
        except (CMPError, ValueError, KeyError) as err:
            raise CMPError(f"{kind}: {encoded} is not the DER of a string") from err
    if text is not None:
        if text[:1] == "#":
            raise CMPError(f"{kind}: write \\# for a number sign at the start of its value")
        merged = re.search(r"[\s/]([A-Za-z]+) ?=", text)
        if merged and merged.group(1).upper() in DN_TYPES:
            raise CMPError(
                f"{kind}: its value contains {merged.group(1)}=: write a comma before it, or \\= if it is no attribute"
            )
        end = len(text.rstrip())
        if re.search(r"(?<!\\)(?:\\\\)*\\$", text[:end]):
            end += 1  # an escaped blank
        text = text[:end]
    return Part(separator, kind, _unescaped(kind, quoted if text is None else text))


def _unescaped(kind: str, text: str) -> str:
    """The value of an attribute without the escapes of RFC 4514: `\\,` and `\\C3\\BC`."""
    data = b""
    for octet, special, plain in re.findall(r"\\([0-9A-Fa-f]{2})|\\([^\w\t\n]|_)|([^\\]+|\\)", text, re.S):
        if plain == "\\":
            raise CMPError(f"{kind}: write two backslashes for one in its value")
        data += bytes.fromhex(octet) if octet else (special or plain).encode("utf-8", "surrogateescape")
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        raise CMPError(f"{kind}: its value is not UTF-8: write two backslashes for one") from err


DN_TYPES = {**{short.upper(): short for short, _, _ in ATTRIBUTES.values()}, **DN_ALIASES}


@functools.lru_cache(maxsize=8)
def _known_types(program: str, version: str) -> dict[str, str]:
    """Name or number of an object -> the short name that this openssl has for it."""
    types: dict[str, str] = {}
    run = _run([program, "list", "-objects"])
    if run.killed():  # half a list is not remembered
        raise CMPError(run.killed())
    for line in run.output.splitlines():
        short, _, rest = line.partition(" = ")
        names, _, number = rest.rpartition(", ")
        if re.fullmatch(r"\d+(\.\d+)+", number) and re.fullmatch(r"[\w.-]+", short):
            for name in (number, names, names.casefold(), short, short.casefold()):
                types.setdefault(name, short)
            types[short] = short
    return types


def _attribute_type(kind: str, binary: Binary) -> str:
    """openssl's short name of an attribute type. Raises CMPError where it has none, for it would leave it out."""
    number = re.sub("^oid[.]", "", kind, flags=re.I)
    if re.fullmatch(r"[\d.]+", number):
        short = ATTRIBUTES[number][0] if number in ATTRIBUTES else ""
    elif kind == "uid":
        raise CMPError("uid: openssl means another attribute than others: write UID (userId) or uniqueIdentifier")
    else:
        short = DN_TYPES.get(kind.upper(), "")
    if short or not binary.path:
        return short or kind
    known = _known_types(binary.path, binary.version)
    short = known.get(number) or known.get(number.casefold()) or "" if number else ""
    if not short:
        near = "" if number[:1].isdigit() else _did_you_mean(kind, {*DN_TYPES.values()}, "")
        raise CMPError(f"openssl does not know the attribute {_one_line(kind, 60)} and would leave it out{near}")
    return short


def _slash_dn(value: str, binary: Binary) -> str:
    """A name in RFC 4514's or in openssl's notation, in openssl's, in the same order: `C=DE, CN=x` is `/C=DE/CN=x`.

    Raises CMPError with the attribute that openssl would skip, cut or misread.
    """
    value = re.sub(r"^(?:subject|issuer)\s*=\s*(?=/|[\w.]+\s*=)", "", value)  # as `openssl x509 -subject` prints it
    text = ""
    for part in _split_slash(value) if value.startswith("/") else _split_rfc4514(value):
        short = _attribute_type(part.type, binary)
        tag, characters, shortest, longest = DN_VALUES.get(short, ANY_TEXT)
        length, fault = len(part.value), ""
        if not part.value:
            fault = "has no value"
        elif not shortest <= length <= longest:
            size = f"{shortest}" if shortest == longest else f"at most {longest}"
            fault = f"'{_one_line(part.value, 60)}' has {length} characters, possible are {size}"
        elif "\0" in part.value or not re.fullmatch(characters, part.value):
            fault = f"'{_one_line(part.value, 60)}' contains a character that is not possible there"
        elif part.tag not in (None, tag):
            fault = "openssl encodes its value in another way than #hex says: write the text"
        if fault:
            raise CMPError(f"{_one_line(part.type, 60)}: {fault}")
        text += (
            ("+" if part.separator == "+" and text else "/") + short + "=" + re.sub(r"([\\/+])", r"\\\1", part.value)
        )
    return text or "/"


def _our_keys(section: Mapping[str, Any]) -> dict[str, str]:
    """What of a section is ours, a misspelt `CMP_` or `cmp-` included: nobody else would say that it is ignored."""
    return {key: str(value) for key, value in section.items() if key[:3].lower() == "cmp"}


def _hide(text: str, secrets: Iterable[str]) -> str:
    """`text`, which is not ours, without the secrets; one of less than four characters would hide everything else."""
    for secret in sorted(secrets, key=len, reverse=True):
        printed = os.fsencode(secret).decode("utf-8", "replace")  # as a program's output is read: see _utf8()
        for spelled in {secret, printed, _one_line(printed, len(printed) + 1)}:
            if len(spelled) > 3:
                text = text.replace(spelled, "***")
    return re.sub(r"(?i)(pin-value=)[^;&?\s]+", r"\1***", text)


# --- Values


def _check_text(option: str, value: str) -> None:
    """Raise CMPError where a value holds what the configuration file does not take away from it: quotes, comments."""
    below = re.search(r"[\r\n]\s*(cmp_\w+)\s*[:=]", value)
    if below:
        raise CMPError(
            f"the line {below.group(1)} below begins with a blank, and so belongs to this value: remove the blank"
        )
    if re.search(r"[\r\n]", value) and option not in FILE_LIST_KEYS:
        raise CMPError("has more than one line: what is indented belongs to the line above it")
    escape = "; if it belongs to the secret, write pass: before that" if option in SECRET_KEYS else ""
    if value[:1] in ("'", '"') and len(value) > 1 and value[-1] == value[0]:
        raise CMPError(f"write the value without the quotes{escape}")
    comment = r"\s[#;](\s|$)" if option in DN_KEYS else r"\s[#;]"
    if re.search(comment, value) and not (option in SECRET_KEYS and value.startswith("pass:")):
        hint = "; if it belongs to the name, write a backslash before it" if option in DN_KEYS else escape
        raise CMPError(f"a comment needs a line of its own{hint}")


def _check_address(value: str) -> None:
    """Raise CMPError where openssl cannot understand an address of a server, or understands another one."""
    host, port = r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[\w.-]+)", r"(?::([^/]*))?"
    found = re.fullmatch(rf"(?:https?://)?{host}{port}(/|/[^/\s]\S*)?", value, re.A)
    bare = re.sub("^https?://", "", value).partition("/")[0]
    if bare.count(":") > 1 and "[" not in bare:
        raise CMPError("an address of IPv6 needs brackets, such as [2001:db8::1]:8080")
    if not found:
        raise CMPError(f"'{_one_line(value, 100)}' is no address such as 192.168.14.137:8080 or cmp.acme.test:8080")
    number = found.group(2)
    if number is not None and not (re.fullmatch(r"\d{1,5}", number, re.A) and 0 < int(number) < 65536):
        raise CMPError(f"'{_one_line(number, 40)}' is no port: 1 to 65535 are possible")


def _check_value(option: str, value: str) -> None:
    """Raise CMPError where openssl cannot use a value, or would use another one."""
    if option in FILE_KEYS | FILE_LIST_KEYS:
        _check_files(option, value)
    if option in ("msg_timeout", "total_timeout") and not re.fullmatch(r"\d{1,6}", value, re.A):
        raise CMPError("must be a number of seconds")
    if option in NUMBER_KEYS and not re.fullmatch(r"-?\d{1,12}", value, re.A):
        raise CMPError("must be a number")
    if option in ("server", "proxy"):
        _check_address(value)
    if option == "path" and re.search(r"\s|^\w+://", value):
        raise CMPError("is the path on the server alone, such as pkix/, without a blank")
    if option in CHOICES and value not in CHOICES[option]:
        folded = re.sub("[^a-z0-9]|with", "", value.lower())
        near = sorted(n for n in CHOICES[option] if re.sub("[^a-z0-9]|with", "", n.lower()) == folded)
        hint = f"openssl calls it {near[-1]}" if near else f"possible are {', '.join(sorted(CHOICES[option]))}"
        raise CMPError(CHOICE_HINTS.get(option) or f"'{_one_line(value, 40)}' is no name for it: {hint}")


def _option_value(option: str, value: str, binary: Binary) -> str | None:
    """The value of `-option`, None for a bare flag. Raises CMPError with what is wrong with it."""
    takes_value = binary.options.get(option)
    if value.lower() in ON and option != "profile":
        if takes_value:
            raise CMPError("needs a value, not True")
        return None
    if takes_value is False:
        raise CMPError("is a switch: set it to True or False")
    if not value or "\0" in value:
        raise CMPError("has no value: give it one, or delete the line")
    _check_text(option, value)
    _check_visible(option, value)
    _check_value(option, value)
    return _utf8(_slash_dn(value, binary)) if option in DN_KEYS else ",".join(_file_list(option, value))


def _settings(section: Mapping[str, str]) -> Settings:
    """Read the section. What helpers raise or yield about it is collected here, and in `_options`."""
    section = {_key(key): str(value).strip() for key, value in section.items()}
    # A distinguished name is read first, as characters: see _option_value().
    section = {key: value if key[4:] in DN_KEYS else _utf8(value) for key, value in section.items()}
    findings, binary = [], NO_BINARY
    try:
        binary = _binary(section.get("cmp_openssl_bin") or "openssl")
    except (CMPError, OSError) as err:
        findings.append(Finding(FAULT, str(err)))
    options, secrets, errors = _options(section, binary)
    stray = {spelled for secret in _stray_secrets(section, binary.options) for spelled in (secret, _unquoted(secret))}
    settings = Settings(
        binary,
        # The process may change its own directory.
        _openssl_path(os.path.abspath(section.get("cmp_tmp_dir") or _default_directory())),
        own_directory=not section.get("cmp_tmp_dir"),
        options=options,
        secrets=secrets,
        hidden=frozenset({*secrets.values(), *stray} - {""}),
        errors=(),
        warnings=(),
        refuse_changes=section.get("cmp_refuse_changes", "").lower() in ON,
        san_types=_san_types(section.get("cmp_san_types", "")),
    )
    findings += [*errors, *_check_section(section, settings)]
    return settings._replace(
        options=_with_defaults(options, binary),
        errors=tuple(text for level, text in findings if level == FAULT),
        warnings=tuple(text for level, text in findings if level == WARNING),
    )


def _options(section: Mapping[str, str], binary: Binary) -> tuple[dict[str, str | None], dict[str, str], list[Finding]]:
    """openssl's options, the environment variables with their secrets, and what is wrong with single lines."""
    options: dict[str, str | None] = {"cmd": "ir", "popo": "0"}
    secrets: dict[str, str] = {}
    findings = []
    for key, value in section.items():
        option = VARIABLE_KEYS.get(key) or _option_name(key[4:], binary.options)
        if not value and f"{key}_variable" in section:
            continue  # left to the variable
        try:
            if key in VARIABLE_KEYS:
                if section.get(f"cmp_{option}"):  # a configured value takes precedence
                    continue
                value = f"env:{value}" if option in SECRET_KEYS else _variable_value(option, value)
            elif not _is_option(key, option, value, binary):
                continue
            options.pop(option, None)  # the configured ones in their order, after the defaults
            if value.lower() in OFF and option != "profile":
                continue
            options[option] = _option_value(option, value, binary)
            if option in SECRET_KEYS:
                name, secret = _secret(option, value)
                options[option], secrets[name] = f"env:{name}", secret
                _check_secret(secret)
        except CMPError as err:
            findings.append(Finding(FAULT, f"{_one_line(key, 60)}: {err}"))
            options[option] = None  # it is there, if not usable
    return options, secrets, findings


def _is_option(key: str, option: str, value: str, binary: Binary) -> bool:
    """Whether a key stands for an option of openssl, or for the handler alone. Raises CMPError where it must not be."""
    if not key.startswith("cmp_"):
        meant = "cmp_" + re.sub(r"^cmp[^a-z]?", "", key.lower()).replace("-", "_")
        raise CMPError(f"is no key of ours and would be ignored; did you mean {_one_line(meant, 60)}?")
    if option in OUR_KEYS:
        _check_text(option, value)
        if option == "refuse_changes" and value.lower() not in ("", *ON, *OFF):
            raise CMPError("is a switch: set it to True or False")
        if option == "san_types":
            _check_san_types(value)
        return False
    if option in FORBIDDEN_KEYS:
        raise CMPError(f"-{option} is not for enrolling at a CA: delete it")
    known = binary.options
    if known and option not in known and option not in RUNTIME_KEYS:
        if option == "profile":
            raise CMPError(f"needs OpenSSL 3.3 or later, this is {binary.version}")
        near = _did_you_mean(option, known.keys() - UNUSABLE_KEYS | OUR_KEYS, "cmp_")
        raise CMPError(f"this openssl has no option -{_one_line(option)}{near}")
    return option not in RUNTIME_KEYS


# --- Files that the configuration names


class Contents(NamedTuple):
    """What a file holds: `kinds` of things, and the validity of its first certificate (empty if there is none)."""

    kinds: frozenset[str]
    not_before: str = ""
    not_after: str = ""


CERTIFICATE_LABELS = ("CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE")
PEM_KINDS = {
    "CERTIFICATE REQUEST": "a certificate request",
    "NEW CERTIFICATE REQUEST": "a certificate request",
    "PUBLIC KEY": "a public key",
    "PKCS7": "PKCS #7 (convert it: openssl pkcs7 -print_certs)",
    "CMS": "PKCS #7 (convert it: openssl pkcs7 -print_certs)",
    "X509 CRL": "a CRL",
}
CERTIFICATE, PRIVATE_KEY, ENCRYPTED_KEY = "a certificate", "a private key", "an encrypted private key"
PKCS12, UNREADABLE, EMPTY = "PKCS #12", "neither PEM nor DER", "nothing"
SIGNED_DATA = "1.2.840.113549.1.7.2"


def _der_contents(data: bytes) -> Contents:
    """What the DER in a file is."""
    try:
        certificate = _certificate(data)
        return Contents(frozenset({CERTIFICATE}), certificate.not_before, certificate.not_after)
    except CMPError:
        pass
    try:
        first, *others = _sequence(data)
    except (CMPError, ValueError):
        return Contents(frozenset({UNREADABLE}))
    if first.tag == 0x02:  # a version, of PKCS #12 it is 3
        return Contents(frozenset({PKCS12 if first.value == b"\3" else PRIVATE_KEY}))
    if first.tag == 0x06:
        return Contents(frozenset({PEM_KINDS["PKCS7"] if _oid(first.value) == SIGNED_DATA else UNREADABLE}))
    if [other.tag for other in others] == [0x04]:
        return Contents(frozenset({ENCRYPTED_KEY}))
    request = first.value[:3] == b"\x02\x01\x00"
    return Contents(frozenset({PEM_KINDS["CERTIFICATE REQUEST"] if request else "something else"}))


@functools.lru_cache(maxsize=64)
def _read_contents(path: str, _modified: int, _size: int) -> Contents:
    """What a file holds; read once, and again when it has changed."""
    with open(path, "rb") as file:
        data = file.read(1 << 22)
    if not data.strip():
        return Contents(frozenset({EMPTY}))
    if data[:1] == b"\x30":
        return _der_contents(data)
    kinds, validity = set(), ("", "")
    for label, body in re.findall(rb"-----BEGIN ([A-Z0-9 ]+)-----(.*?)-----END", data, re.S):
        name = label.decode()
        if name in CERTIFICATE_LABELS:
            try:
                certificate = _certificate(next(_elements(binascii.a2b_base64(body))).raw)
                validity = validity if validity[0] else (certificate.not_before, certificate.not_after)
                kinds.add(CERTIFICATE)
            except (CMPError, StopIteration, binascii.Error):
                kinds.add("a damaged certificate")
        elif name.endswith("PRIVATE KEY"):
            kinds.add(ENCRYPTED_KEY if b"ENCRYPTED" in label + body else PRIVATE_KEY)
        elif name in PEM_KINDS:
            kinds.add(PEM_KINDS[name])
    return Contents(frozenset(kinds or {UNREADABLE}), *validity)


def _contents(path: str) -> Contents:
    """What a file holds; nothing is known of a URI such as pkcs11:."""
    if not os.path.isfile(path):
        return Contents(frozenset())
    info = os.stat(path)
    return _read_contents(os.path.abspath(path), info.st_mtime_ns, info.st_size)


def _file_list(option: str, value: str) -> list[str]:
    """The files that an option names: openssl splits some at commas and blanks, and knows no escape for a blank."""
    if option not in FILE_LIST_KEYS:
        return [value]
    return [name for name in re.split(r"[,\s]+", _openssl_path(value)) if name]


def _check_readable(names: Sequence[str]) -> None:
    """Raise CMPError with the files that cannot be read. A URI such as pkcs11: is openssl's to open."""
    faults = []
    for name in names:
        is_file = os.path.isfile(name)
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name) and not (is_file and os.access(name, os.R_OK)):
            what = "cannot be read by this process" if is_file else "is not a file"
            faults.append(f"{_one_line(name, 100)} {what}")
    if faults:
        raise CMPError(", ".join(faults))


def _check_files(option: str, value: str) -> None:
    """Raise CMPError where the files of an option cannot be read, or hold something else than openssl looks for."""
    if value[:1] == "[" and value[-1:] == "]":
        raise CMPError("is a list: write the files into one line, with commas between them")
    names = _file_list(option, value)
    _check_readable(names)
    wanted = {PRIVATE_KEY, ENCRYPTED_KEY, PKCS12} if option.endswith("key") else {CERTIFICATE, PKCS12}
    what = "private key" if option.endswith("key") else "certificate"
    for name in names if option != "config" else ():
        kinds = _contents(name).kinds
        if kinds == {EMPTY}:
            raise CMPError(f"{_one_line(name, 100)} is empty")
        if kinds and not kinds & wanted:
            raise CMPError(f"{_one_line(name, 100)} holds no {what}, but {' and '.join(sorted(kinds))}")


def _readable_by_all(path: str) -> bool:
    """Whether every local user can read a file."""
    return os.name == "posix" and os.path.isfile(path) and bool(os.stat(path).st_mode & 0o004)


# --- Secrets

# Where a secret could come out, and what keeps it in:
#   openssl's arguments   `_options` puts `env:NAME` there; `_check_visible` refuses PINs and passwords in other options
#   openssl's environment `_start` adds `Settings.secrets` for that one process; nobody but its user can read it
#   the log, errors       openssl's messages, and the CA's texts in them and in its answers, pass `_foreign`: it masks
#                         `Settings.hidden`; of ours, those about a secret never show its value
#   unexpected exceptions `CAhandler._failure` masks their texts as well
#   what cannot be read   `_load_config` and `_read_ini` say the number of the line, not what is in it
#   files                 none is written with one: openssl reads `cmp_secret: file:` and the like through us
#   the command line      `check` prints through `_masked`, keys with secrets through `_shown`; `convert` prints what
#                         the user has typed, with a warning


VARIABLE_KEYS = {"cmp_ref_variable": "ref", "cmp_secret_variable": "secret"}


def _usual_variable(name: str) -> bool:
    """Whether this looks like the name of an environment variable, and not like a secret, put there by mistake."""
    return re.fullmatch(r"[A-Z]+|[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", name) is not None


def _variable_value(option: str, name: str) -> str:
    """What an environment variable holds. Raises CMPError where it is not set."""
    if not os.environ.get(name):
        shown = name if option not in SECRET_KEYS or _usual_variable(name) else "of that name (not shown)"
        raise CMPError(f"the environment variable {_one_line(shown)} is not set")
    return os.environ[name]


_descriptors: dict[tuple[int, int, int], bytes] = {}  # what was read from pipes, which say it only once


def _read_descriptor(number: str) -> bytes:
    """What acme2certifier has inherited in a file descriptor."""
    if sys.platform == "win32" or not re.fullmatch(r"\d{1,6}", number):
        raise CMPError("fd: needs the number of a file descriptor; on Windows there is none")
    descriptor = int(number)
    info = os.fstat(descriptor)
    if stat.S_ISREG(info.st_mode):
        return os.pread(descriptor, 1024, 0)
    key = (descriptor, info.st_dev, info.st_ino)
    if key not in _descriptors:
        if not select.select([descriptor], [], [], 0)[0]:
            raise CMPError(f"nothing to read from file descriptor {descriptor}")
        _descriptors[key] = os.read(descriptor, 1024)
    return _descriptors[key]


def _secret_line(source: str, rest: str) -> str:
    """The first line of a file or descriptor: openssl takes the same. Raises CMPError where it is not what it seems."""
    if source == "file":
        _check_readable([rest])
    try:
        if source == "file":
            with open(rest, "rb") as file:
                data = file.read(1024)
        else:
            data = _read_descriptor(rest)
    except (OSError, OverflowError) as err:
        raise CMPError(f"{source}:{_one_line(rest, 100)} cannot be read: {getattr(err, 'strerror', err)}") from err
    line, where = data.partition(b"\n")[0], f"{source}:{_one_line(rest, 100)}"
    if line[:3] == b"\xef\xbb\xbf":
        raise CMPError(f"{where} begins with a byte order mark: save it as UTF-8 without BOM")
    if b"\0" in line:
        raise CMPError(f"{where} is no text in UTF-8 or ASCII")
    if b"\r" in line:
        raise CMPError(f"{where} has line ends of Windows, which openssl takes into the secret: save it with LF alone")
    if not line.strip():
        raise CMPError(f"the first line of {where} is empty")
    return os.fsdecode(line)


def _secret(option: str, value: str) -> tuple[str, str]:
    """The environment variable for openssl's `-secret` and the like, and what it is to hold."""
    prefix, colon, rest = value.partition(":")  # openssl-passphrase-options(1); without a prefix, the secret
    source, name = prefix if colon else "", "CMP_CA_HANDLER_" + option.upper()
    if value == "stdin":
        raise CMPError("stdin: acme2certifier has no terminal: use file:PATH or env:NAME")
    if source == "env":
        return rest, _variable_value(option, rest)
    if source in ("file", "fd"):
        return name, _secret_line(source, rest)
    return name, rest if source == "pass" else value


def _check_secret(secret: str) -> None:
    """Raise CMPError where a secret is none, without showing it."""
    if not secret:
        raise CMPError("the secret is empty")
    if re.search(r"[\r\n\0]", secret):
        raise CMPError("the secret contains a line break: take it out")


PIN_VALUE = re.compile(r"pin-value=([^;&?\s]*)", re.I)
PIN_PARAMETER = re.compile(r"[^=]*(?:pin|pass|secret)[^=]*=(?!file:)(.*)", re.I | re.S)


def _check_visible(option: str, value: str) -> None:
    """Raise CMPError where everybody could see a secret in the value of an option: in the list of processes."""
    if PIN_VALUE.search(value):
        why = "every local user can see a pin-value in the list of processes"
        raise CMPError(f"{why}: write pin-source=file:PATH in its place, or cmp_keypass: env:NAME")
    if option == "provparam" and PIN_PARAMETER.match(value):
        raise CMPError("every local user can see a PIN there: write file:PATH for it, or use cmp_keypass: env:NAME")
    if option in ("server", "proxy") and "@" in value:
        raise CMPError("a user and password there are visible to every local user, and openssl ignores them: remove")


def _stray_secrets(section: Mapping[str, str], known: Collection[str]) -> Iterator[str]:
    """What looks like a secret where none should be: it is an error there, and nobody's text may show it either."""
    for key, value in section.items():
        option = _option_name(key[4:], known)
        usable = option in known and option not in UNUSABLE_KEYS and key.startswith("cmp_")
        if option in SECRET_KEYS or key == "cmp_secret_variable":
            variable = re.sub("^env:", "", value)
            named = variable != value or key == "cmp_secret_variable"
            if named and not os.environ.get(variable) and not _usual_variable(variable):
                yield variable
        elif not usable and option not in OUR_KEYS and _looks_secret(option):
            yield value
        yield from PIN_VALUE.findall(value)
        if option == "provparam":
            yield from PIN_PARAMETER.findall(value)[:1]
        if option in ("server", "proxy") and "@" in value:
            yield _password(value)
    yield from (_password(os.environ[name]) for name in _proxies() if "@" in os.environ[name])


def _unquoted(text: str) -> str:
    """`text` without the percent-encoding of URIs."""
    plain = re.sub(b"%([0-9A-Fa-f]{2})", lambda code: bytes([int(code.group(1), 16)]), os.fsencode(text))
    return os.fsdecode(plain)


def _password(url: str) -> str:
    """The password in a URL, or else the user's name."""
    user = re.sub("^[A-Za-z]+://", "", url).rpartition("@")[0]
    return user.partition(":")[2] or user


def _proxies() -> list[str]:
    """The environment variables from which openssl takes a proxy."""
    return [name for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY") if os.environ.get(name)]


SECRETIVE = re.compile("secr|pass|pwd|pin$|token|psk", re.I)


def _looks_secret(option: str) -> bool:
    """Whether a key that is no option of openssl is likely to be a misspelt secret."""
    import difflib  # only needed for a typo

    names = [*SECRET_KEYS, "password", "pin"]
    return bool(SECRETIVE.search(option) or difflib.get_close_matches(option.lower(), names, 1, 0.7))


# --- The section as a whole


def _check_section(section: Mapping[str, str], settings: Settings) -> Iterator[Finding]:
    """What no single line shows: what is missing, what does not fit together, what is weak."""
    options, binary = settings.options, settings.binary
    if "cmp_openssl_bin" not in section:
        yield Finding(WARNING, f"cmp_openssl_bin is not set: using {binary.path or 'openssl'}, the first on the PATH")
    if settings.own_directory:
        lost = "a restart, or systemd's PrivateTmp, hides orders that wait for the CA from the poller"
        yield Finding(WARNING, f"cmp_tmp_dir is not set: using {settings.directory}, and {lost}")
    for key in section:
        if key.startswith("cmp_") and key[4:] in RUNTIME_KEYS:
            yield Finding(WARNING, f"{key} is set by the handler itself and ignored here: delete it")
    yield from _check_secrets(section, settings)
    if options.keys() & {"config", "section"}:
        key = "cmp_config" if "config" in options else "cmp_section"
        yield Finding(WARNING, f"{key}: what stands in that OpenSSL configuration file is not checked here")
    else:  # an OpenSSL configuration file may hold all of this
        yield from _check_essentials(options)
        yield from _check_tls(section, settings)
        yield from _check_credentials(options, "")
        yield from _check_credentials(options, "tls_")
    for option, why in WEAK_KEYS.items():
        if option in options:
            yield Finding(WARNING, f"cmp_{option} weakens security: {why}")
    if options.get("popo") == "-1" and options.get("cmd") != "p10cr" and "newkeyout" in binary.options:
        yield Finding(FAULT, f"cmp_popo: {binary.version} sends no request without a proof: delete it")
    yield from _check_timeouts(options)
    yield from _check_proxies(options)
    fault = _directory_fault(settings)
    if fault:
        yield Finding(FAULT, fault)


def _check_secrets(section: Mapping[str, str], settings: Settings) -> Iterator[Finding]:
    """Secrets that are easy to find out, or that look like a mistake."""
    for option in [option for option in settings.options if option in SECRET_KEYS]:
        secret = settings.secrets.get((settings.options[option] or "").partition(":")[2], "")
        if secret != secret.strip():
            yield Finding(WARNING, f"cmp_{option}: the secret begins or ends with a blank, which counts")
        if option == "secret" and 0 < len(secret) < 8:
            what = "has less than 8 characters: whoever sees one message can find it by trying"
            yield Finding(WARNING, f"cmp_secret {what}; ask the CA for a longer one")
        prefix, _, path = section.get(f"cmp_{option}", "").partition(":")
        if prefix == "file" and _readable_by_all(path):
            yield Finding(WARNING, f"cmp_{option}: every local user can read {_one_line(path, 100)}: chmod o-r")


def _check_timeouts(options: Mapping[str, str | None]) -> Iterator[Finding]:
    """Time-outs that do not fit each other, as openssl wants it."""
    message, total = options.get("msg_timeout"), options.get("total_timeout")
    if total and int(total) == 0 and message != "0":
        what = "0 would wait for ever: set a number of seconds, or cmp_msg_timeout: 0 as well"
        yield Finding(FAULT, f"cmp_total_timeout: {what}")
    elif message and total and int(message) > int(total):
        yield Finding(FAULT, "cmp_total_timeout must not be less than cmp_msg_timeout")


def _with_defaults(options: Mapping[str, str | None], binary: Binary) -> dict[str, str | None]:
    """The options, with what is not configured of those that each run needs."""
    result = dict(options)
    if "config" in binary.options and not options.keys() & {"config", "section"}:
        result["config"] = ""  # the system's openssl.cnf may have a section cmp that nobody here knows of
    message, total = options.get("msg_timeout"), options.get("total_timeout")
    result["msg_timeout"] = message or str(min(MSG_TIMEOUT, int(total or MSG_TIMEOUT)))
    result["total_timeout"] = total or str(max(TOTAL_TIMEOUT, int(message or 0) + MSG_TIMEOUT))
    if "keep_alive" in binary.options:
        result.setdefault("keep_alive", "0")  # a CA may tie a transaction to its connection, and we may come back
    return result


def _check_proxies(options: Mapping[str, str | None]) -> Iterator[Finding]:
    """Say which proxy openssl takes from the environment."""
    proxies = _proxies()
    for name in proxies:
        if "@" in os.environ[name]:
            yield Finding(WARNING, f"{name}: openssl does not send the user and password in it, but prints them")
    if proxies and not options.keys() & {"proxy", "no_proxy"}:
        what = f"openssl takes the proxy from {', '.join(proxies)}: set cmp_no_proxy if it should not"
        yield Finding(WARNING, what)


def _check_essentials(options: Mapping[str, str | None]) -> Iterator[Finding]:
    """What an enrolment cannot do without."""
    if "server" not in options:
        yield Finding(FAULT, "cmp_server is missing: set it to the address:port of the CMP server")
    if "secret" not in options and "unprotected_requests" not in options:
        if "cert" not in options or "key" not in options:
            yield Finding(FAULT, "no credentials: set cmp_ref and cmp_secret, or cmp_cert and cmp_key")
        elif not options.keys() & {"trusted", "srvcert"}:
            yield Finding(WARNING, "cmp_trusted is not set: the CA's signed answers cannot be verified")
    if "trusted" in options and not options.keys() & {"srvcert", "expect_sender"}:
        who = "whoever has a certificate of that CA, and is on the way to it, can answer in its name"
        what = f"cmp_trusted without cmp_expect_sender or cmp_srvcert: {who}"
        yield Finding(WARNING, f"{what}; set cmp_expect_sender to the sender of its answers")


def _check_tls(section: Mapping[str, str], settings: Settings) -> Iterator[Finding]:
    """Half a setting of TLS is a connection without TLS, or one with anybody."""
    options, binary = settings.options, settings.binary
    url = (options.get("server") or "").startswith("https://")
    useless = ", ".join(f"cmp_{option}" for option in options if option in TLS_KEYS)
    if settings.tls:
        if "tls_trusted" not in options:
            yield Finding(WARNING, "cmp_tls_trusted is not set: the TLS server is not authenticated")
    elif url:
        what = f"cmp_tls_used is missing: {binary.version} wants cmp_tls_used: True for https://"
        yield Finding(FAULT, what)
    elif useless and section.get("cmp_tls_used", "").lower() in OFF:
        yield Finding(WARNING, f"{useless}: not used, the connection is plain HTTP")
    elif useless:
        what = "without cmp_tls_used: the connection is plain HTTP: set cmp_tls_used: True"
        yield Finding(FAULT, f"{useless} {what}")


def _check_credentials(options: Mapping[str, str | None], kind: str) -> Iterator[Finding]:
    """Look at cmp_cert and cmp_key, or at cmp_tls_cert and cmp_tls_key, without starting a process."""
    cert, key, keypass = (f"{kind}{what}" for what in ("cert", "key", "keypass"))
    # Where a secret protects the messages, the certificate is not used, except for the default of cmp_recipient.
    level = WARNING if not kind and "secret" in options else FAULT
    if (cert in options) != (key in options) and (kind or "secret" in options):
        have, lack = (cert, key) if cert in options else (key, cert)
        what = "only the names in it are used" if have == "cert" else "set both, or none"
        yield Finding(level, f"cmp_{have} without cmp_{lack}: {what}")
    if keypass in options and key not in options:
        yield Finding(WARNING, f"cmp_{keypass} without cmp_{key}: there is no key for it")
    found = _contents(options.get(key) or "")
    if found.kinds & {ENCRYPTED_KEY, PKCS12} and PRIVATE_KEY not in found.kinds and keypass not in options:
        yield Finding(level, f"cmp_{key}: the key is encrypted: set cmp_{keypass}")
    if _readable_by_all(options.get(key) or ""):
        yield Finding(WARNING, f"cmp_{key}: every local user can read {options[key]}: chmod o-r")
    yield from _check_validity(f"cmp_{cert}", options.get(cert) or "", level)


def _check_validity(key: str, path: str, level: str) -> Iterator[Finding]:
    """A certificate of ours that is not valid now, or will not be for long."""
    found, now = _contents(path), time.time()
    today, soon = (time.strftime(ISO_TIME, time.gmtime(now + more)) for more in (0, EXPIRES_SOON))
    what = f"{key}: the certificate in {_one_line(path, 100)}"
    if found.not_before > today:
        yield Finding(level, f"{what} is not valid before {found.not_before[:10]}")
    elif found.not_after and found.not_after <= today:
        yield Finding(level, f"{what} has expired on {found.not_after[:10]}: renew it")
    elif found.not_after and found.not_after <= soon:
        yield Finding(WARNING, f"{what} expires on {found.not_after[:10]}: renew it")


# --- The request --------------------------------------------------------------------------------------------


# The ACME server has checked the names that it read in the CSR, with a library that gives up on all extensions where
# it cannot read one. openssl reads the CSR again, and the CA what openssl sends. So what one of them could read
# otherwise, or not at all, is refused, and so is a name that nobody has checked.

COMMON_NAME = "2.5.4.3"
EXTENSION_REQUESTS = ("1.2.840.113549.1.9.14", "1.3.6.1.4.1.311.2.1.14")  # PKCS #9 and Microsoft's
EC_PUBLIC_KEY, RSASSA_PSS = "1.2.840.10045.2.1", "1.2.840.113549.1.1.10"
RSA_KEYS = ("1.2.840.113549.1.1.1", "2.5.8.1.1", RSASSA_PSS)

# GeneralName (RFC 5280, 4.2.1.6): tag -> kind, and what its contents look like, as `_form` writes DER.
VISIBLE = r"(2[1-9a-f]|[3-6]\w|7[0-9a-e])+"  # one or more characters of ASCII, without blanks and NUL
SAN_KINDS = {
    0x81: ("email", rf"81:{VISIBLE};"),
    0x82: ("DNS", rf"82:{VISIBLE};"),
    0x86: ("URI", rf"86:{VISIBLE};"),
    0x87: ("IP", r"87:(\w{8}|\w{32});"),
    0x88: ("RID", r"88:\w+;"),
    0xA0: ("otherName", r"a0\(06:\w+;a0\((\w+:\w*;|30\((\w+:\w*;)+\))\)\)"),
    0xA4: ("dirName", r"a4\(30\((31\((30\(06:\w+;(0c|13|16|1e):\w+;\))+\))+\)\)"),
}
CHECKED_KINDS = frozenset(("DNS", "IP", "email"))  # those that acme2certifier compares with the order

# The extensions that its library reads, and what it surely can read. None: no client's request needs it, for it tells
# of the CA, or names somebody. Others are opaque to everybody but the CA.
EXTENSIONS = {
    "2.5.29.14": ("subjectKeyIdentifier", r"04:\w*;"),
    "2.5.29.15": ("keyUsage", r"03:0\d(\w\w){0,2};"),
    "2.5.29.16": ("privateKeyUsagePeriod", None),
    "2.5.29.17": ("subjectAltName", r"30\(.+\)"),  # and SAN_KINDS
    "2.5.29.18": ("issuerAltName", None),
    "2.5.29.19": ("basicConstraints", r"30\(\)"),  # CA:FALSE is the default, which DER does not write down
    "2.5.29.30": ("nameConstraints", None),
    "2.5.29.31": ("cRLDistributionPoints", rf"30\((30\(a0\(a0\((86:{VISIBLE};)+\)\)\))+\)"),
    "2.5.29.32": ("certificatePolicies", r"30\((30\(06:\w+;(30\((30\(06:2b06010505070201;16:\w*;\))+\))?\))+\)"),
    "2.5.29.35": ("authorityKeyIdentifier", r"30\((80:\w+;)?\)"),
    "2.5.29.36": ("policyConstraints", None),
    "2.5.29.37": ("extKeyUsage", r"30\((06:\w+;)+\)"),
    "2.5.29.46": ("freshestCRL", None),
    "2.5.29.54": ("inhibitAnyPolicy", None),
    "1.3.6.1.5.5.7.1.1": ("authorityInfoAccess", rf"30\((30\(06:\w+;86:{VISIBLE};\))+\)"),
    "1.3.6.1.5.5.7.1.11": ("subjectInfoAccess", None),
    "1.3.6.1.5.5.7.1.24": ("tlsfeature", r"30\((02:(05|11);)+\)"),  # must-staple
    "1.3.6.1.5.5.7.48.1.5": ("OCSP no check", r"05:;"),
    "1.3.6.1.4.1.311.21.7": ("certificate template", r"30\(06:\w+;(02:[0-7]\w{1,7};){0,2}\)"),
    "1.3.6.1.4.1.311.25.2": ("Active Directory SID", None),
    "1.3.6.1.4.1.11129.2.4.2": ("certificate timestamps", None),
    "1.3.6.1.4.1.11129.2.4.3": ("precertificate poison", None),
    "1.3.36.8.3.3": ("admissions", None),
}


class CSR(NamedTuple):
    """What a PKCS #10 request (RFC 2986) asks for."""

    der: bytes
    subject: Name
    key: bytes  # the subjectPublicKeyInfo
    extensions: dict[str, bytes]


CSR_LABEL = "(?:NEW )?CERTIFICATE REQUEST"


def _csr(argument: object, kinds: Collection[str]) -> CSR:
    """Read a CSR, with names of these `kinds`. Raises CMPError where it is none, or where others may misread it."""
    try:
        der = _decode(argument, CSR_LABEL)
        _check_der(der, values=False)
        try:
            information, _, _ = _sequence(der)
            version, subject, key, *attributes = _sequence(information.raw)
            if version.raw != b"\x02\x01\x00" or [a.tag for a in attributes] not in ([], [0xA0]):
                raise ValueError
            algorithm, bits = _sequence(key.raw)
            _check_key(algorithm, bits)
            csr = CSR(der, _name(subject.raw), key.raw, _requested(attributes[0].value if attributes else b""))
        except (IndexError, ValueError) as err:
            raise CMPError("it is not a PKCS #10 request") from err
        _check_common_name(csr.subject)
        for oid, value in csr.extensions.items():
            _check_extension(oid, value)
        _check_alternative_names(csr.extensions.get(SUBJECT_ALT_NAME, b"\x30\x00"), kinds)
    except CMPError as err:
        raise CMPError(f"not a usable CSR: {err}") from err
    return csr


def _check_key(algorithm: Element, key: Element) -> None:
    """Refuse a key with which anybody can sign: then the CSR's signature proves no possession of the private key."""
    kind, *parameters = _sequence(algorithm.raw)
    oid, tags = _oid(kind.value), [parameter.tag for parameter in parameters]
    if tags not in ([], [0x05], [0x06]) and oid != RSASSA_PSS:
        # With a generator of one's own choice the private key of any public point is known (CVE-2020-0601).
        name = "explicit EC" if oid == EC_PUBLIC_KEY else "DSA or other"
        raise CMPError(f"its key has {name} parameters, so its signature proves nothing: use RSA or a named curve")
    if oid in RSA_KEYS:
        _check_der(key.value[1:], values=True)
        _, exponent = _sequence(key.value[1:])
        number = int.from_bytes(exponent.value, "big", signed=True)
        if number < 3 or number % 2 == 0:  # with 1 the signature is the message
            raise CMPError("its RSA key has an exponent below 3, or an even one, so its signature proves nothing")


def _requested(attributes: bytes) -> dict[str, bytes]:
    """The extensions of the one extension request (RFC 2985, 5.4.2): of two, everybody would read another one."""
    requests = []
    for attribute in _elements(attributes):
        kind, values = _sequence(attribute.raw)
        if _oid(kind.value) in EXTENSION_REQUESTS:
            requests.append(values)
    if len(requests) > 1:
        raise CMPError(f"it has {len(requests)} extension requests, which others read differently: one is possible")
    extensions: dict[str, bytes] = {}
    for values in requests:
        content = list(_elements(values.value))
        if values.tag != 0x31 or [element.tag for element in content] != [0x30]:
            raise CMPError("its extension request is not exactly one list of extensions")
        for extension in _elements(content[0].value):
            fields = [f.raw if f.tag == 0x01 else f.tag for f in _sequence(extension.raw)]
            identifier, value = _sequence(extension.raw)[0], _sequence(extension.raw)[-1]
            name = EXTENSIONS.get(_oid(identifier.value), (_oid(identifier.value),))[0]
            if fields not in ([0x06, 0x04], [0x06, b"\x01\x01\xff", 0x04]):  # FALSE is the default of `critical`
                raise CMPError(f"its extension {name} is not DER: an identifier, TRUE (FF) if critical, and a value")
            if _oid(identifier.value) in extensions:
                raise CMPError(f"it has the extension {name} twice")
            extensions[_oid(identifier.value)] = value.value
    return extensions


def _check_common_name(subject: Name) -> None:
    """The ACME server compares the first CN with the order: it must be the only one, and read alike by everybody."""
    names = [attribute for rdn in subject for attribute in rdn if attribute.type == COMMON_NAME]
    if len(names) > 1:
        raise CMPError(f"its subject has {len(names)} common names (CN): one is possible")
    for name in names:
        alike = name.text is not None and "\0" not in name.text
        if name.tag == 0x14 and not name.raw.isascii():  # TeletexString is Latin-1 for some, UTF-8 for others
            alike = alike and not _is_der_value(UTF8, name.raw)
        if not alike:
            raise CMPError("its common name (CN) is no string that everybody reads alike")


def _check_extension(oid: str, value: bytes) -> None:
    """Refuse what the ACME server's library may not be able to read, and what is not for a client to ask for."""
    if oid not in EXTENSIONS:
        return
    name, expected = EXTENSIONS[oid]
    if expected is None:
        raise CMPError(f"it asks for the extension {name}, which is for the CA to decide")
    try:
        _check_der(value, values=True)
    except CMPError as err:
        raise CMPError(f"its extension {name} is malformed: {err}") from err
    form = _form(value)
    usage = value[3:5].ljust(2, b"\0") if oid == KEY_USAGE else b"\0\0"  # the bits of RFC 5280, 4.2.1.3
    if usage[0] & 0x04 or (oid == BASIC_CONSTRAINTS and form.startswith("30(01:ff;")):
        raise CMPError(f"it asks for a CA certificate ({name}), which no ACME client needs")
    half = not usage[0] & 0x08 and (usage[0] & 0x01 or usage[1] & 0x80)  # encipherOnly says how keyAgreement is used
    if half or not re.fullmatch(expected, form):
        raise CMPError(f"its extension {name} is malformed, or acme2certifier may not be able to read it")


def _form(data: bytes) -> str:
    """DER as text, for regular expressions: `30(06:550403;0c:61;)` is SEQUENCE { 2.5.4.3, "a" }."""
    elements = _elements(data)
    return "".join(f"{t:02x}({_form(v)})" if t & 0x20 else f"{t:02x}:{v.hex()};" for t, v, _ in elements)


def _check_alternative_names(value: bytes, kinds: Collection[str]) -> None:
    """Each subjectAltName is well-formed, and of one of these `kinds`."""
    for name in _sequence(value):
        kind, form = SAN_KINDS.get(name.tag, ("", ""))
        text = _one_line(ascii(name.value)[2:-1], 80)
        if not kind:
            raise CMPError(f"its subjectAltName [{name.tag & 0x1F}] '{text}' is of a kind that nobody uses")
        if kind not in kinds:
            raise CMPError(f"its subjectAltName {kind} '{text}' is none of cmp_san_types: {', '.join(kinds)}")
        if not re.fullmatch(form, _form(name.raw)) or (kind == "RID" and not _is_der_value(0x06, name.value)):
            raise CMPError(f"its subjectAltName {kind} '{text}' is malformed")


def _check_san_types(value: str) -> None:
    """Raise CMPError where cmp_san_types names a kind that there is not."""
    known = [kind for kind, _ in SAN_KINDS.values()]
    for word in re.split(r"[,\s]+", value.strip(", ")):
        if word.lower() not in map(str.lower, known):
            near = _did_you_mean(word, known, "")
            raise CMPError(f"'{_one_line(word, 40)}' is none of {', '.join(known)}{near}")


def _san_types(value: str) -> list[str]:
    """The kinds of subjectAltNames that cmp_san_types allows."""
    words = re.split(r"[,\s]+", value.lower())
    kinds = {kind for kind, _ in SAN_KINDS.values() if kind.lower() in words}
    # Where it names none of the usual ones, it adds to them: no ACME client asks for a certificate without.
    return sorted(kinds if kinds & CHECKED_KINDS else kinds | CHECKED_KINDS)


def _alternative_names(extensions: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """The subjectAltNames (RFC 5280, 4.2.1.6) as (kind, text); what is no text is in hexadecimal."""
    names = []
    for name in _sequence(extensions.get(SUBJECT_ALT_NAME, b"\x30\x00")):
        kind, text = SAN_KINDS.get(name.tag, (f"[{name.tag & 0x1F}]",))[0], name.value.hex()
        if kind in ("email", "DNS", "URI"):
            text = name.value.decode("ascii", "backslashreplace")
        elif kind == "IP" and len(name.value) in (4, 16):
            import ipaddress  # not every certificate has one

            text = str(ipaddress.ip_address(name.value))
        names.append((kind, text))
    return names


def _wanted(csr: CSR) -> str:
    """What a CSR asks for, for the log: its subject, or else its names."""
    names = ", ".join(f"{kind}:{name}" for kind, name in _alternative_names(csr.extensions))
    return _name_text(csr.subject) if csr.subject else _one_line(names, 100) or "(no name)"


def _subject(csr: CSR, settings: Settings) -> str | None:
    """What to pass as `-subject`; None leaves the subject to `-csr`."""
    converts = settings.binary.converts_csr()
    if csr.subject:
        text = _slash_form(csr.subject, exact=converts)
        if text is None and not converts:
            version, subject = settings.binary.version, _name_text(csr.subject)
            raise CMPError(f"{version} cannot carry the subject {subject}, OpenSSL 3.0 can")
        return text and _utf8(text)
    if "subject" in settings.options:
        return settings.options["subject"]
    # Corporate CAs refuse an empty subject, and certbot's is empty. A longer name than 64 is no CN (RFC 5280, A.1).
    for kind, name in _alternative_names(csr.extensions):
        if kind == "DNS" and 0 < len(name) <= 64:
            text = _slash_form([[Attribute(COMMON_NAME, UTF8, name, b"")]], exact=True)
            return text and _utf8(text)
    return None


def _request(csr: CSR, transaction: Transaction) -> list[str]:
    """The options that describe one enrolment."""
    settings = transaction.settings
    known = settings.binary.options
    arguments = ["-newkey", transaction.file("pubkey.pem"), "-certout", transaction.file("cert.pem")]
    arguments += ["-extracertsout", transaction.file("extracerts.pem")]
    if "cacertsout" in known:
        arguments += ["-cacertsout", transaction.file("capubs.pem")]
    if "san_nodefault" in known:  # without it the names of the RA's own certificate go into the request
        arguments += [f"-{settings.binary.spelled['san_nodefault']}"]
    subject = _subject(csr, settings)
    if settings.binary.converts_csr() or settings.options.get("cmd") == "p10cr":
        arguments += ["-csr", transaction.file("csr.pem")]
    else:
        names = _alternative_names(csr.extensions)
        carried = [(k, name) for k, name in names if k in ("DNS", "URI", "IP") and not re.search(r"[\s,\\]", name)]
        lost = [kind for kind, name in names if (kind, name) not in carried]
        lost += [oid for oid in csr.extensions if oid != SUBJECT_ALT_NAME]
        if lost:
            transaction.logger.warning("openssl before 3.0 cannot carry these parts of the CSR: %s", ", ".join(lost))
        if carried:
            arguments += ["-sans", _utf8(",".join(name for _, name in carried))]
    if subject is not None and settings.options.get("cmd") != "p10cr":
        arguments += ["-subject", subject]
        if not transaction.read("subject"):
            transaction.write("subject", subject)
    return arguments


def _prove_possession(csr: CSR, transaction: Transaction) -> None:
    """Check the CSR's signature and save its public key. Raises CMPError where the signature does not fit.

    `_check_key`, before this, has refused the keys with which anybody can sign.
    """
    # `-popo 0` tells the CA that the RA has verified possession of the private key (RFC 4211, 4). Nobody else does.
    if transaction.read("pubkey.pem"):
        return  # a poll: it was verified before the CA was asked
    transaction.write("csr.pem", _pem(csr.der, "CERTIFICATE REQUEST"))
    program = transaction.settings.binary.path
    # Without -config, `req` fails where the openssl.cnf that the program was built for is not there.
    argv = [program, "req", "-config", os.devnull, "-in", transaction.file("csr.pem"), "-verify", "-noout", "-pubkey"]
    run = _run(argv)
    # The exit code of OpenSSL 3.0 is 0 for a bad signature too, so the message decides.
    verified = SIGNATURE_FITS.search(run.output)
    key = PUBLIC_KEY.search(run.output)
    if SIGNATURE_WRONG.search(run.output):
        raise CMPError("the CSR's signature does not fit its public key: no proof of possession, refused")
    if run.code != 0 or not verified or not key:
        said = [m.text for m in _messages(run.output)]
        hint = "" if run.killed() else _hint("cannot use the CSR")
        raise CMPError(f"openssl cannot use the CSR: {run.killed() or _one_line('; '.join(said[:2]))}{hint}")
    transaction.write("pubkey.pem", key.group(0))


# --- A transaction is a directory ---------------------------------------------------------------------------


def _way(path: str, depth: int = 0) -> Iterator[str]:
    """The directory, those above it, and the same for each symbolic link on the way: all that can lead us elsewhere."""
    here = os.path.abspath(path)
    while True:
        yield here
        if os.path.islink(here) and depth < 40:
            yield from _way(os.path.join(os.path.dirname(here), os.readlink(here)), depth + 1)
        if here == os.path.dirname(here):
            return
        here = os.path.dirname(here)


def _directory_fault(settings: Settings) -> str:
    """Why cmp_tmp_dir cannot be used, or an empty string. Makes nothing."""
    configured, name = settings.directory, _one_line(settings.directory, 100)
    if re.search(r"[\s,\\\0]", configured):
        return f"cmp_tmp_dir {name}: openssl cannot use a name with a blank, a comma or a backslash"
    if settings.own_directory and os.path.islink(configured):
        return f"cmp_tmp_dir {configured} is a symbolic link: set cmp_tmp_dir to a directory of your own"
    real = path = os.path.realpath(configured)
    while not os.path.lexists(path):
        path = os.path.dirname(path)  # it will be made, if its parent lets us
    if not os.path.isdir(path):
        return f"cmp_tmp_dir {_one_line(path, 100)} is not a directory"
    if not os.access(path, os.W_OK | os.X_OK):
        user = _user()
        return f"cmp_tmp_dir {name} cannot be written by {user}: install -d -o {user} -m 700 {name}"
    # Whoever can rename our directories, or those above, can put another public key into a request.
    ways = [*_way(configured), *(_way(real) if real != configured else ())]
    places = (place for place in ways if os.path.lexists(place))
    return next((f"cmp_tmp_dir: {_one_line(p, 100)} {who}" for p in places if (who := _writable_by_others(p))), "")


def _make_directory(path: str) -> None:
    """Like os.makedirs, but the directories in between are nobody else's either."""
    if not os.path.isdir(path):
        _make_directory(os.path.dirname(os.path.abspath(path)))
        os.makedirs(path, 0o700, exist_ok=True)  # somebody may have been quicker
        with contextlib.suppress(OSError):  # who may write into a directory need not be allowed to open it
            _sync(os.path.dirname(os.path.abspath(path)))


class Transaction:
    """`<cmp_tmp_dir>/<id>/`, locked while it is in use, and what the work on it needs. close() deletes it, or keeps it.

    csr.pem, pubkey.pem         the request: what the client has signed, and its key
    subject, profile            what was sent as -subject; what the order's profile has set
    NNN.der                     the CA's answers; the newest holds the nonce that it expects next
    NNN.new                     an answer as openssl saved it: the last of them may be anybody's
    enrolling                   renamed to `waiting` when the CA's decision is still out
    repeated                    a repeated certConf got no answer
    issued                      the result of a poll, kept for a day, when all else is gone
    lock                        held by the process that works on it, however that ends, and its openssl
    of one run alone            NNN.req, scratch, cert.pem, extracerts.pem, capubs.pem; of the chain stored.pem,
                                issuer.pem, below.pem; of a revocation old.pem

    Where the CA answers "waiting", wait() renames `enrolling`, and close() lets go of the lock and deletes nothing. The
    next poll locks it (`_resume`), returns at once if checkAfter has not passed (`_due`), or else replays the answers
    to openssl, which asks the CA (`_exchange`). With a certificate, or a final no, close() deletes all but `issued`.
    """

    def __init__(self, settings: Settings, identifier: str, lock: int, logger: logging.Logger) -> None:
        self.settings, self.identifier, self.lock, self.logger = settings, identifier, lock, logger
        self.path = f"{settings.directory}/{identifier}"
        self.keep = False
        self.started = time.monotonic()
        self.cmp_id = ""  # CMP's transactionID, once the CA has answered

    def file(self, name: str) -> str:
        """The path of one of its files."""
        return f"{self.path}/{name}"

    def write(self, name: str, text: str, sync: bool = False) -> None:
        """Make one of its files: whole, or not at all; with `sync` so that a power failure changes nothing of that."""
        part = self.file(name + ".part")
        with open(part, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
        if sync:
            _sync(part)
        os.replace(part, self.file(name))

    def read(self, name: str) -> str:
        """The text of one of its files, empty if there is none."""
        if not os.path.exists(self.file(name)):
            return ""
        with open(self.file(name), encoding="utf-8", errors="replace") as file:
            return file.read()

    def remove(self, *names: str) -> None:
        """Delete some of its files, those that are there."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.file(name))

    def remove_requests(self) -> None:
        """Delete the saved requests: they tell how far one run of openssl has come."""
        self.remove("scratch", *(name for name in os.listdir(self.path) if name.endswith(".req")))

    def saved(self) -> list[str]:
        """The names of the saved answers, in order, whole or not."""
        names = (name for name in os.listdir(self.path) if re.fullmatch(r"\d{3,}\.(der|new)", name))
        return sorted(names, key=lambda name: (len(name), name))  # 1000 comes after 999

    def asked(self, number: int) -> bool:
        """Whether openssl has made the request for this answer, that is, has accepted the one before."""
        made = _response(self.file(f"{number:03d}.req"))
        return made is not None and made.body != ERROR

    def answers(self) -> list[Response]:
        """The saved answers that are whole, in order."""
        return [response for response in (_response(self.file(name)) for name in self.saved()) if response is not None]

    def answered(self) -> bool:
        """Whether there is an answer. Takes no descriptor: there may be none left."""
        return any(os.path.exists(self.file(name)) for name in ("001.new", "001.der"))

    def wait(self) -> None:
        """Let it wait for the CA. That is a promise, so it is on the disk before it is said."""
        self.keep = True
        try:
            os.rename(self.file("enrolling"), self.file("waiting"))  # possible on a full disk too
            for name in os.listdir(self.path):
                _sync(self.file(name))
            for path in (self.path, os.path.dirname(self.path)):
                _sync(path)
        except OSError as err:
            what = f"{self.path} may not survive a power failure"
            self.logger.error("CMP enrolment %s waits, but %s: %s", self.identifier, what, err.strerror)

    def finish(self, bundle: str) -> None:
        """Keep the result: acme2certifier may be killed before it has stored what poll() returned."""
        try:
            self.write("issued", bundle, sync=True)
            _sync(self.path)
        except OSError as err:
            self.logger.warning("cannot keep the result of %s for a second poll: %s", self.identifier, err.strerror)

    def close(self) -> None:
        """Let go of the directory, and delete it unless it is to keep.

        In this order: without its lock nobody can take the transaction up again, so nobody finds half of it. A poll
        that has opened the lock before, and gets it after we let go, sees that its file is gone (`_resume`).
        """
        try:
            try:
                if not self.keep:
                    os.remove(self.file("lock"))
            finally:
                _unlock(self.lock)  # also where somebody has deleted the directory: or else a descriptor is lost
            if not self.keep:
                _delete(self.path, but="issued")
        except OSError as err:
            self.logger.error("cannot delete %s: %s", self.path, err.strerror)


def _delete(path: str, but: str = "") -> None:
    """Delete a transaction's directory, or all in it `but` one file. Takes one descriptor: no more may be left."""
    names = os.listdir(path)
    try:
        for name in names:
            if name != but:
                os.remove(os.path.join(path, name))
        if but not in names:
            os.rmdir(path)
    except IsADirectoryError:
        shutil.rmtree(path)


def _begin(settings: Settings, logger: logging.Logger) -> Transaction:
    """A new transaction with a random identifier."""
    if not os.path.isdir(settings.directory):
        _make_directory(settings.directory)
        fault = _directory_fault(settings)  # again: somebody may have been quicker than us
        if fault:
            raise CMPError(fault)
    _sweep(settings, logger)
    identifier = os.urandom(16).hex()
    path = os.path.join(settings.directory, identifier)
    os.mkdir(path, 0o700)
    try:
        lock = _locked(os.path.join(path, "lock"), new=True)
    except OSError:
        _delete(path)
        raise
    return Transaction(settings, identifier, lock, logger)


def _check_identifier(identifier: object) -> None:
    """Raise CMPError where it is none: it becomes a part of paths."""
    if not isinstance(identifier, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", identifier):
        raise CMPError("not a transaction identifier")


def _resume(settings: Settings, identifier: str, logger: logging.Logger) -> Transaction:
    """The transaction of this identifier, locked. Raises CMPError where it is unknown or somebody works on it."""
    base, path = settings.directory, os.path.join(settings.directory, identifier, "lock")
    unknown = CMPError(f"no transaction {identifier} in {base}: it is finished, or cmp_tmp_dir has changed or was lost")
    try:
        lock = _locked(path)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise unknown from err
    except BlockingIOError as err:
        raise CMPError(f"transaction {identifier} is in progress: somebody else polls it now") from err
    if not os.path.exists(path):  # finished between our open and our lock
        _unlock(lock)
        raise unknown
    return Transaction(settings, identifier, lock, logger)


def _kept_result(settings: Settings, identifier: str) -> str:
    """The bundle that an earlier poll has returned, empty if there is none."""
    path = os.path.join(settings.directory, identifier, "issued")
    if os.path.islink(path) or not os.path.isfile(path):
        return ""
    with open(path, encoding="ascii") as file:
        return file.read()


_swept: dict[str, float] = {}


def _sweep(settings: Settings, logger: logging.Logger) -> None:
    """Delete what killed enrolments left (an hour old, not waiting, and nobody holds the lock), and old results."""
    base, now = settings.directory, time.time()
    if abs(now - _swept.get(base, 0)) < ABANDONED / 6:
        return
    _swept[base] = now
    for name in os.listdir(base):
        path = os.path.join(base, name)
        try:
            age = now - os.lstat(path).st_mtime
            if not re.fullmatch("[0-9a-f]{32}", name) or age <= ABANDONED:
                continue
            if os.path.exists(os.path.join(path, "issued")):
                if age > KEPT:
                    _delete(path)
            elif not os.path.exists(os.path.join(path, "lock")):  # killed while it was made or deleted
                _delete(path)
                logger.warning("deleted %s, left by an enrolment that was killed at its start", path)
            elif not os.path.exists(os.path.join(path, "waiting")):
                _sweep_enrolment(settings, name, logger)
        except (CMPError, OSError) as err:
            logger.debug("not swept: %s", _one_line(str(err)))


def _sweep_enrolment(settings: Settings, name: str, logger: logging.Logger) -> None:
    """Delete an enrolment or a revocation that was killed, unless it waits.

    A looks for `waiting` and sees none. B's enrolment gets the CA's "waiting", renames `enrolling` to `waiting` and
    lets go of the lock. A gets the lock. So A has to look again: what waits under its lock goes on waiting.
    """
    with closing(_resume(settings, name, logger)) as transaction:
        transaction.keep = os.path.exists(transaction.file("waiting"))
        if not transaction.keep:
            if not os.path.exists(transaction.file("enrolling")):
                logger.warning("deleted %s, left by a revocation that was killed: revoke again", transaction.path)
                return
            answers = transaction.answers()
            text = f"CMP transaction {answers[-1].transaction}" if answers else "no answer of the CA"
            with contextlib.suppress(CMPError):  # killed before the CSR was written
                text = f"{_wanted(_csr(transaction.read('csr.pem'), settings.san_types))}, {text}"
            what = f"deleted {transaction.path}, left by an enrolment that was killed: {text}"
            logger.warning("%s; the CA may have issued a certificate that nobody has: revoke it there", what)


# --- The exchange with the CA, and its verdict ----------------------------------------------------------------


class Outcome(NamedTuple):
    """How an exchange ended: with the `leaf`, or waiting, or it failed; `final` is a no that the CA won't take back."""

    leaf: Certificate | None = None
    waiting: bool = False
    text: str = ""
    final: bool = False


class Gate:
    """Holds openssl back before it sends a second pollReq, so that it can be ended while nothing is in flight.

    A CA that says checkAfter 0 is asked again and again without a pause. openssl writes each request to a file before
    it sends it (-reqout): this one's "file" is a pipe that is full, so it waits there until somebody reads. If we are
    killed, the pipe breaks, and openssl goes on until its time is up.
    """

    def __init__(self) -> None:
        self.reader, self.writer = (_above_2(descriptor) for descriptor in os.pipe())
        self.file = f"/dev/fd/{self.writer}"
        for descriptor in (self.reader, self.writer):
            os.set_blocking(descriptor, False)
        with contextlib.suppress(BlockingIOError):  # it is full
            while True:
                os.write(self.writer, bytes(65536))
        os.set_blocking(self.writer, True)
        self.opened = False

    def open(self, path: str) -> None:
        """Let it pass, and save the request."""
        self.opened = True
        with contextlib.suppress(BlockingIOError), open(path, "ab") as file:
            while True:
                chunk = os.read(self.reader, 65536)
                file.write(chunk if file.tell() else chunk.lstrip(b"\0"))  # the zeros before it are ours

    def close(self) -> None:
        """Close the pipe."""
        os.close(self.reader)
        os.close(self.writer)


# What a poll replays to openssl (-rspin): of the saved answers, those from which openssl can go on (`_usable`), without
# the pollReps that another answer has superseded (`_needed_again`).


def _usable(answers: Iterable[Response]) -> list[Response]:
    """The answers as far as openssl can go on from them.

    That is: waiting, pollRep.., certificate, and, where the CA takes its time with the confirmation, waiting,
    pollRep.., pkiConf. A CA says "waiting" once. So a second one is a recording that somebody sends, to end the order:
    OpenSSL 3.5 would take it, and ask no more.
    """
    usable: list[Response] = []
    granted = waiting = False
    for answer in answers:
        if answer.grants() and not granted:
            granted, waiting = True, False
        elif answer.waits() and not waiting and (answer.body == ERROR or not granted):
            waiting = True
        elif not (answer.body == POLLREP and waiting) and not (answer.body == PKICONF and granted):
            break
        usable.append(answer)
    return usable


def _needed_again(answers: Sequence[Response]) -> list[str]:
    """The files that openssl has to see again. An older pollRep says nothing more, and openssl would sleep for it."""
    return [answer.path for answer in answers[:-1] if answer.body != POLLREP] + [a.path for a in answers[-1:]]


def _number(answer: Response) -> int:
    """The number in the name of its file."""
    return int(os.path.basename(answer.path)[:-4])


def _resumed_timeouts(settings: Settings, newest: Response, more_seconds: int) -> dict[str, str]:
    """The time-outs of a run that goes on from `newest`: room for its sleep and two answers, where the sleep is short.

    On a pollRep openssl sleeps min(checkAfter, -total_timeout less its margin) first. So where checkAfter is long, the
    answers can have the margin and no more, for a poll is not to take longer than some seconds.
    """
    margin, answer = settings.binary.margin(), settings.seconds("msg_timeout") or MSG_TIMEOUT
    pause = max(newest.check_after, 0) if newest.body == POLLREP else 0
    total = pause + 2 * answer + margin if pause <= SHORT_CHECK_AFTER else 1 + margin
    total += more_seconds
    return {"msg_timeout": str(min(answer, total)), "total_timeout": str(total)}


def _exchange(request: Sequence[str], key: bytes, transaction: Transaction) -> Outcome:
    """Run openssl for an enrolment: from the start, or on from the answers that are saved in `transaction`."""
    before = _usable(transaction.answers())
    if _disk_full(transaction.path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), transaction.path)  # the answers could not be saved
    useless = {*transaction.saved()} - {os.path.basename(answer.path) for answer in before}
    transaction.remove("cert.pem", *useless)
    transaction.remove_requests()
    run = _ask(request, transaction, before)
    if before and run.only(TIME_IS_UP) and not transaction.asked(_next_number(before)):
        # openssl counts whole seconds: one may have been over before it was asleep. Nothing was sent.
        run = _ask(request, transaction, before, more_seconds=2)
    _copy_requests(transaction, _next_number(before))
    outcome = _verdict(run, request, key, transaction, before)
    transaction.remove_requests()
    expected = [END_OF_REPLAY] if before else []
    expected += [END_OF_WAIT] if outcome.waiting and not outcome.text else []
    _log_messages(transaction.logger, run.messages, "|".join(expected))
    return outcome


def _next_number(answers: Sequence[Response]) -> int:
    """The number of the answer that follows these."""
    return max(map(_number, answers), default=0) + 1


class Watch(NamedTuple):
    """Looks at what openssl has saved while it runs, to end it when it can do no more than sleep."""

    transaction: Transaction
    first: int  # the number of its first answer
    waited: bool  # it goes on from a transaction that waits
    gate: Gate | None
    gated: int  # the number of the request behind the gate
    deadline: float  # until when openssl sends another request
    room: int  # that many answers can be saved

    def asleep(self) -> bool:
        """Whether the CA wants to be asked later than there is time for. Else the next request may pass the gate."""
        if not os.path.exists(self.transaction.file(f"{self.first:03d}.new")):
            return False  # the usual case, and this is asked often
        saved = [name for name in self.transaction.saved() if int(name[:-4]) >= self.first]
        newest = _response(self.transaction.file(saved[-1])) if saved else None
        if newest is None:
            return False
        left = self.deadline - time.monotonic()
        in_time = 1 <= newest.check_after <= left and not self.waited and len(saved) < self.room // 2
        if newest.body == POLLREP and not in_time:
            return True
        if self.gate and len(saved) >= self.gated - self.first:
            self.gate.open(self.transaction.file(f"{self.gated:03d}.req"))
        return False


def _ask(request: Sequence[str], transaction: Transaction, before: Sequence[Response], more_seconds: int = 0) -> Run:
    """Run openssl, save each request and answer, and end it when it has nothing more to do than to sleep."""
    settings, known, replay = transaction.settings, transaction.settings.binary.options, _needed_again(before)
    first = _next_number(before)
    # The first request that may follow a pollRep: of ir, pollReq, pollReq the third; of a poll, which begins with a
    # pollReq, the second.
    gated = first + (1 if before else 2)
    overrides = _resumed_timeouts(settings, before[-1], more_seconds) if before else {}
    total = int(overrides.get("total_timeout") or settings.seconds("total_timeout") or NO_TIMEOUT)
    room = min(MAX_RESPONSES, 2 * total + 10)  # a pollRep takes a second at least, or openssl is ended
    numbers = range(first, first + room)
    files, gate = [], None
    if "rspin" in known:
        scratch = [transaction.file("scratch")] * len(replay)  # what it has seen already is saved once more
        files += ["-rspout", ",".join([*scratch, *(transaction.file(f"{number:03d}.new") for number in numbers)])]
        files += ["-rspin", ",".join(replay)] if replay else []
    with contextlib.ExitStack() as stack:
        if "reqout" in known:
            requests = [transaction.file(f"{number:03d}.req") for number in numbers]
            if "rspin" in known and sys.platform != "win32" and os.path.exists("/dev/fd"):
                gate = stack.enter_context(closing(Gate()))
                requests[gated - first] = gate.file
            files += ["-reqout", ",".join([*(path[:-4] + ".req" for path in replay), *requests])]
        deadline = time.monotonic() + total - max(settings.seconds("msg_timeout"), settings.binary.margin())
        watch = Watch(transaction, first, bool(before), gate, gated, deadline, room)
        run = _openssl_cmp(transaction, request, files, overrides, [gate.writer] if gate else [], watch.asleep)
        if gate and gate.opened:  # what has passed it last may still be in the pipe
            gate.open(transaction.file(f"{gated:03d}.req"))
        return run


def _copy_requests(transaction: Transaction, number: int) -> None:
    """Save the requests where cmp_reqout wants them, from the one for the answer `number` on."""
    wanted = re.split(r"[,\s]+", transaction.settings.options.get("reqout") or "")
    for path, source in zip(wanted, range(number, number + MAX_RESPONSES)):
        saved = transaction.file(f"{source:03d}.req")
        try:
            if path and os.path.exists(saved) and os.path.getsize(saved):
                shutil.copyfile(saved, path)
        except OSError as err:
            transaction.logger.warning("cmp_reqout: cannot write %s: %s", path, err.strerror)


def _verdict(
    run: Run, request: Sequence[str], key: bytes, transaction: Transaction, before: Sequence[Response]
) -> Outcome:
    """What became of the enrolment. `before` are the answers that were there before this run.

    Three sources, in this order of trust: the file that openssl writes as its last act; the CA's messages, read as DER;
    openssl's text. Into that text whoever is on the way can write, so it may say "openssl did not accept this", and
    nothing else.
    """
    settings = transaction.settings
    answers = [answer for answer in transaction.answers() if answer.path not in {old.path for old in before}]
    newest = answers[-1] if answers else None
    leaf = next(iter(_certificates(transaction.file("cert.pem"), transaction.logger)), None)
    if leaf:
        return Outcome(leaf)
    text = _failure_text(run, newest, settings)
    if run.code == 0:
        text = f"openssl saved no whole certificate: is the disk of cmp_tmp_dir {settings.directory} full?"
    granted_before = any(answer.grants() for answer in before)
    leaf_refused = any(map(LEAF_NOT_ACCEPTED.match, run.errors()))
    refused = newest is not None and newest.refuses() and newest.protected
    if run.only(AFTER_ACCEPTANCE) and (leaf_refused or (refused and not granted_before)):
        return Outcome(text=text, final=True)
    history = _keep_authentic(run, request, transaction, before, answers)
    progress = newest is not None and _number(newest) in map(_number, history)
    if granted_before and not progress and not leaf_refused and run.complete() and _confirmed(transaction, before):
        issued = _certificate(next(answer for answer in before if answer.grants()).certificate)
        # The CA answers something else to its confirmation, or does not answer it, for the second time.
        in_vain = newest is not None or _note_unanswered(run, transaction)
        if in_vain and _same_key(issued.key, key):
            transaction.logger.warning("the certificate is issued, but its confirmation is not proven: %s", text)
            return Outcome(issued)
    undecided = progress and (run.asleep or run.only(TIME_IS_UP))
    return Outcome(waiting=bool(history), text="" if undecided else text)


def _confirmed(transaction: Transaction, before: Sequence[Response]) -> bool:
    """Whether openssl takes the certificate in these answers: its certConf says so (RFC 4210, 5.3.18)."""
    if "reqout" not in transaction.settings.binary.options:
        return True  # then only its text says when it does not
    replay, issued = _needed_again(before), next(answer.path for answer in before if answer.grants())
    followed = [*replay, transaction.file(f"{_next_number(before):03d}.new")][replay.index(issued) + 1]
    certconf = _response(followed[:-4] + ".req")
    return certconf is not None and certconf.body == CERTCONF and certconf.status in GRANTED


def _note_unanswered(run: Run, transaction: Transaction) -> bool:
    """Note that a repeated certConf got no answer; whether that was so before. A CA that is away does not count."""
    if any(map(CONNECT_TIMEOUT.match, run.errors())):
        return False
    before = os.path.exists(transaction.file("repeated"))
    transaction.write("repeated", "")
    return before


def _keep_authentic(
    run: Run, request: Sequence[str], transaction: Transaction, before: Sequence[Response], answers: Sequence[Response]
) -> list[Response]:
    """Let the transaction hold its authentic answers, on the disk, and no others; these are returned.

    openssl saves an answer before it checks it. It goes on only from one that it has accepted, so all are authentic but
    perhaps the newest. That one is thrown away only if openssl has certainly not accepted it: a live answer thrown away
    takes with it the nonce that the CA expects next.

    Superseded pollReps stay until the newest answer is known to be authentic: if it is not, the one before it is the
    newest again.
    """
    history = _usable([*before, *answers])
    authentic = _is_newest_authentic(run, request, transaction, history, answers)
    if authentic is False:
        history = history[:-1]
    kept = []
    for answer in history:
        if answer.path.endswith(".new") and (authentic is not None or answer is not history[-1]):
            _sync(answer.path)
            os.replace(answer.path, answer.path[:-4] + ".der")
            answer = answer._replace(path=answer.path[:-4] + ".der")
        kept.append(answer)
    if kept:
        _sync(transaction.path)  # nothing old is deleted before the new is on the disk
    needed = {*_needed_again(kept)} if authentic is not None else {answer.path for answer in kept}
    transaction.remove(*(name for name in transaction.saved() if transaction.file(name) not in needed))
    return [answer for answer in kept if answer.path in needed]


def _is_newest_authentic(
    run: Run, request: Sequence[str], transaction: Transaction, history: Sequence[Response], answers: Sequence[Response]
) -> bool | None:
    """Whether the newest answer is the CA's. None: nobody knows now.

    - One of this run, and usable: yes if openssl says no more than that the time is up. Or else all of them are
      replayed without a server: yes if openssl goes on from this answer, and it fits its request.
    - One of a poll that was killed (NNN.new): yes if openssl has made the request that follows it; no if openssl has
      ended without that. None if openssl did not come so far: perhaps cmp_secret is wrong for now.
    - All others were known before.
    """
    if answers and history[-1:] == list(answers[-1:]):
        fits = _fits(history, _response(answers[-1].path[:-4] + ".req"))
        return run.only(TIME_IS_UP) or (fits and _goes_on_from(transaction, request, history))
    if history and not answers and history[-1].path.endswith(".new"):
        if transaction.asked(_next_number(history)):
            return True
        return False if run.complete() and transaction.asked(_number(history[-1])) else None
    return True


def _fits(history: Sequence[Response], asked: Response | None) -> bool:
    """Whether the newest answer is one to its request: by the transaction, and by the nonce of that request or, as
    RFC 9483 (4.4) has it, of the first one.

    Somebody may send an answer that he has recorded: its protection fits, its nonce does not. A replay cannot show
    that, for openssl then takes transaction and nonces from the answers themselves.
    """
    newest, nonces = history[-1], [answer.nonces[1] for answer in history[:-1][:1]]
    return asked is None or (newest.transaction == asked.transaction and newest.nonces[1] in [*nonces, asked.nonces[0]])


def _goes_on_from(transaction: Transaction, request: Sequence[str], history: Sequence[Response]) -> bool | None:
    """Whether openssl accepts the newest of these answers: it gets them replayed, and no server. None: nobody knows."""
    settings, replay = transaction.settings, _needed_again(history)
    known = settings.binary.options
    if not {"rspin", "reqout"} <= known.keys():
        return None
    files = ["-rspin", ",".join(replay)]
    number = _number(history[-1])
    requests = [*["scratch"] * (len(replay) - 1), f"{number:03d}.req", f"{number + 1:03d}.req"]
    files += ["-reqout", ",".join(map(transaction.file, requests))]
    for option in ("certout", "extracertsout", "cacertsout"):  # the disk may be full, which says nothing of the answer
        files += [f"-{option}", os.devnull] if option in known else []
    nowhere = {"server": "127.0.0.1:9", "msg_timeout": "1"}
    nowhere.update({"no_proxy": "127.0.0.1"} if "no_proxy" in known else {})

    complete = True
    # With so little time openssl gives up on a pollRep at once, and says so. Where it says more, it has to go on.
    for total in [1, 1 + settings.binary.margin()] if history[-1].body == POLLREP else [1]:
        transaction.remove(*requests)
        overrides = {**nowhere, "total_timeout": str(total)}
        run = _openssl_cmp(transaction, request, files, overrides, asleep=lambda: transaction.asked(number + 1))
        if run.code == 0 or transaction.asked(number + 1) or (transaction.asked(number) and run.only(POLLREP_TAKEN)):
            return True
        complete = complete and run.complete()
    return False if complete else None


def _due(answers: Sequence[Response]) -> bool:
    """Whether the CA may be asked again (checkAfter, RFC 4210, 5.3.22). A clock that was set back does not count."""
    if answers[-1].body != POLLREP or not answers[-1].path.endswith(".der"):
        return True
    age = time.time() - os.stat(answers[-1].path).st_mtime
    pause = answers[-1].check_after
    return not 0 <= age < (max(pause, 1) if 0 <= pause < 1 << 63 else 0)


NO_OVERRIDES: Mapping[str, str | None] = types.MappingProxyType({})


def _command(
    settings: Settings, arguments: Sequence[str], overrides: Mapping[str, str | None] = NO_OVERRIDES
) -> list[str]:
    """The openssl command line: the configured options in their order, then what belongs to this request."""
    argv = [settings.binary.path, "cmp"]
    for option, value in {**settings.options, **overrides}.items():
        if option == "subject" or (option == "popo" and settings.options.get("cmd") == "p10cr"):
            continue  # decided for each request; no part of a p10cr
        name = settings.binary.spelled.get(option, option)
        argv += [f"-{name}"] if value is None else [f"-{name}", value]
    argv += ["-batch"] if "batch" in settings.binary.options else []  # it asks nobody anything
    return [*argv, *arguments]


def _openssl_cmp(
    transaction: Transaction,
    request: Sequence[str],
    files: Sequence[str] = (),
    overrides: Mapping[str, str | None] = NO_OVERRIDES,
    keep: Sequence[int] = (),
    asleep: Callable[[], bool] = lambda: False,
) -> Run:
    """One run of `openssl cmp`, logged without the many names of `files` for answers."""
    settings, command = transaction.settings, _command(transaction.settings, request, overrides)
    if transaction.logger.isEnabledFor(logging.DEBUG):  # it holds no secret: those are in the environment
        transaction.logger.debug("running %s", " ".join(_one_line(word) or "''" for word in command))
    limit = int(overrides["total_timeout"] or 0) + GRACE if "total_timeout" in overrides else settings.limit()
    run = _run([*command, *files], limit, settings.secrets, [transaction.lock, *keep], asleep)
    answers = transaction.answers()
    if answers:
        transaction.cmp_id = answers[-1].transaction
    words = [word for answer in answers for word in answer.printed()]
    return run._replace(messages=_messages(run.output, settings.hidden, words), words=words)


# --- What the CA said: its saved messages, read as DER --------------------------------------------------------


class Response(NamedTuple):
    """A message that openssl has saved (RFC 4210, 5.1 to 5.3): what it says, not whether it is the CA's."""

    path: str
    body: int
    transaction: str = ""  # transactionID, in hexadecimal
    nonces: tuple[bytes, bytes] = (b"", b"")  # senderNonce and recipNonce
    protected: bool = False
    mac: bool = False  # protected with a shared secret: nobody else can make that
    status: int | None = None
    failures: tuple[str, ...] = ()  # the bits of failInfo
    texts: tuple[str, ...] = ()  # statusString, or the reason of a pollRep
    error_code: int | None = None
    details: tuple[str, ...] = ()
    check_after: int = 0
    certificate: bytes = b""

    def waits(self) -> bool:
        """Whether the CA has not decided yet (ip, cp or error, with the status waiting)."""
        return self.body in (IP, CP, ERROR) and self.status == WAITING

    def grants(self) -> bool:
        """Whether it brings a certificate."""
        return self.body in (IP, CP) and self.status in GOOD and bool(self.certificate)

    def refuses(self) -> bool:
        """Whether it is the end without a certificate, or of a revocation without success."""
        if self.body == RP:
            return self.status not in (*GOOD, WAITING)
        return self.body in (IP, CP, ERROR) and not self.waits() and not self.grants()

    def printed(self) -> list[str]:
        """Its texts, as they are in openssl's output."""
        texts = [*self.texts, ", ".join(self.details)]
        return [text.partition("\0")[0].replace("\r\n", "\n") for text in texts if text]

    def words(self, secrets: Collection[str]) -> str:
        """What it says, for people: `badCertTemplate, 'unknown extension'`."""
        said = [", ".join(self.failures) or ("waiting" if self.status == WAITING else "rejection")]
        said += [f"'{_foreign(', '.join(self.texts), secrets)}'"] if self.texts else []
        said += [f"errorCode {self.error_code}"] if self.error_code is not None else []
        details = [detail for detail in self.details if detail not in self.texts]  # some CAs say the same in both
        said += [f"'{_foreign(', '.join(details), secrets)}'"] if details else []
        return ", ".join(said)


MAC_ALGORITHMS = _keys("1.2.840.113533.7.66.13 1.2.840.113549.1.5.14")  # PasswordBasedMac, PBMAC1


def _response(path: str) -> Response | None:
    """Read a saved message; None where it is not a whole one."""
    try:
        with open(path, "rb") as file:
            response = _parsed(file.read(MAX_DER))
    except FileNotFoundError:
        return None
    return response and response._replace(path=path)


@functools.lru_cache(maxsize=64)  # an exchange looks at its messages again and again
def _parsed(data: bytes) -> Response | None:
    """Parse a message, see `_response`."""
    try:
        header, body, *rest = _sequence(data)
        # sender and recipient may have the tag 0xA4, too: they come before the transactionID, and the last one counts.
        fields = {field.tag: field.value for field in _elements(header.value)}
        # Not a generator: there StopIteration would become a RuntimeError.
        identifier, *nonces = [next(_elements(fields.get(tag, b"\x04\x00"))).value for tag in (0xA4, 0xA5, 0xA6)]
        mac = _oid(_sequence(fields.get(0xA1, b"\x30\x02\x06\x00"))[0].value) in MAC_ALGORITHMS
    except (CMPError, LookupError, ValueError, StopIteration):
        return None
    protected, name = any(field.tag == 0xA0 for field in rest), _one_line(identifier.hex(), 64)
    response = Response("", body.tag & 0x1F, name, (nonces[0], nonces[1]), protected, protected and mac)
    try:
        return response._replace(**_body(response.body, body.value))
    except (CMPError, LookupError, ValueError, StopIteration):
        return response  # a body that nobody can read says nothing


def _body(kind: int, value: bytes) -> dict[str, Any]:
    """What a PKIBody says, as fields of a Response. Raises an error of DER where it is malformed."""
    if kind == POLLREP:  # PollRepContent, 5.3.22
        _, check_after, *reason = _elements(_sequence(value)[0].value)
        return {"check_after": _integer(check_after), "texts": _free_text(reason)}
    if kind == RP:  # RevRepContent, 5.3.10
        return _status_info(next(_elements(_sequence(value)[0].value)))
    if kind == ERROR:  # ErrorMsgContent, 5.3.21
        status, *more = _sequence(value)
        codes = [_integer(field) for field in more if field.tag == 0x02]
        details = _free_text([field for field in more if field.tag == 0x30])
        return {**_status_info(status), "error_code": codes[0] if codes else None, "details": details}
    if kind == CERTCONF:  # CertConfirmContent, 5.3.18: no statusInfo means accepted
        _, _, *more = _elements(_sequence(value)[0].value)
        info = [field for field in more if field.tag == 0x30]  # hashAlg may follow, with or without it (RFC 9480, 2.10)
        return _status_info(info[0]) if info else {"status": 0}
    if kind in (IP, CP):  # CertRepMessage, 5.3.4: caPubs may come first
        responses = [field for field in _sequence(value) if field.tag == 0x30]
        _, status, *more = _elements(next(_elements(responses[0].value)).value)
        pair = [field for field in more if field.tag == 0x30]  # rspInfo may follow, with or without it
        certificates = [field for field in _elements(pair[0].value) if field.tag == 0xA0] if pair else []
        return {**_status_info(status), "certificate": certificates[0].value if certificates else b""}
    return {}


def _status_info(info: Element) -> dict[str, Any]:
    """PKIStatusInfo, 5.2.3."""
    status, *more = _elements(info.value)
    bits = next((field.value for field in more if field.tag == 0x03), b"")
    numbers = [8 * i + bit for i, octet in enumerate(bits[1:5]) for bit in range(8) if octet & 0x80 >> bit]
    failures = tuple(FAILURES[number] for number in numbers if number < len(FAILURES))
    texts = _free_text([field for field in more if field.tag == 0x30])
    return {"status": _integer(status), "failures": failures, "texts": texts}


def _integer(element: Element) -> int:
    """An INTEGER."""
    return int.from_bytes(element.value, "big", signed=True)


def _free_text(fields: Sequence[Element]) -> tuple[str, ...]:
    """PKIFreeText, 5.1.1."""
    return tuple(text.value.decode("utf-8", "replace") for field in fields for text in _elements(field.value))


def _failure_text(run: Run, newest: Response | None, settings: Settings) -> str:
    """Why it failed, on one line, with a hint: in the CA's own words, where openssl has accepted these."""
    if newest is not None and (newest.refuses() or newest.body == RP) and run.only(AFTER_ACCEPTANCE):
        return _refusal_text(newest, settings)
    unverified = f"; an unverified answer says: {newest.words(settings.hidden)}" if newest and newest.refuses() else ""
    if run.killed() and not run.asleep:
        return f"{run.killed()} (CMP server {settings.server}){unverified}"
    # What looks like the CA's answer in openssl's text is not, or it would have been accepted.
    errors = [error for error in run.errors() if not unverified or not ACCEPTED.match(error)]
    searched = " ".join(HTTP_WORDS.sub("", error) for error in errors)
    if not run.errors() or NOT_BEGUN.match(run.errors()[0]):
        errors = [m.text for m in run.messages if CAUSE.match(m.text)]
        searched = " ".join(m.text for m in run.messages)  # no server has written anything
    if run.asleep and not errors:  # ended by us, before it could say that it does not accept this pollRep
        usable = newest is not None and 0 <= newest.check_after < 1 << 63
        errors = ["openssl does not accept the answer" if usable else "checkAfter out of range"]
        searched = errors[0]
    said = _one_line("; ".join(errors[:4])) or "openssl gave no reason"
    return f"CMP with {settings.server} failed: {said}{unverified}" + _hint(searched)


def _refusal_text(answer: Response, settings: Settings) -> str:
    """What the CA has answered in place of a yes."""
    waiting = answer.status == WAITING
    verb = "answered" if waiting else "rejected the request:"
    failures = " ".join(answer.failures) or f"PKIStatus: {'waiting' if waiting else 'rejection'}"
    # Where the CA says more than that it does not trust the signer, that is the reason, not the certificate.
    more = {*answer.details} - {*answer.texts} or answer.error_code is not None
    hint = "" if failures == "signerNotTrusted" and more else _hint(failures)
    return f"CMP server {settings.server} {verb} {answer.words(settings.hidden)}{hint}"


# --- The chain ----------------------------------------------------------------------------------------------


def _certificates(path: str, logger: logging.Logger) -> list[Certificate]:
    """The certificates in a PEM or DER file; what is none is passed over."""
    if not os.path.isfile(path):
        return []
    with open(path, "rb") as file:
        data = file.read()
    pem = rf"-----BEGIN (?:{'|'.join(CERTIFICATE_LABELS)})-----([A-Za-z0-9+/=\s]*)-----END"
    blocks = re.findall(pem.encode(), data) or [data]
    found = []
    for block in blocks:
        try:
            der = block if block is data else binascii.a2b_base64(block)
            found.append(_certificate(next(_elements(der)).raw))  # openssl's trust settings follow in TRUSTED ones
        except (CMPError, binascii.Error, StopIteration) as err:
            logger.debug("%s: %s", path, err)
    return found


_stored: dict[tuple[str, int, int], list[Certificate]] = {}


def _configured_certificates(path: str, transaction: Transaction) -> list[Certificate]:
    """The certificates in a file that the configuration names. PKCS #12 is openssl's to open."""
    found = _certificates(path, transaction.logger)
    if found or not os.path.isfile(path):
        return found
    info, settings = os.stat(path), transaction.settings
    mark = (path, info.st_mtime_ns, info.st_size)
    if mark not in _stored:
        source = settings.options.get("otherpass")
        argv = [settings.binary.path, "storeutl", "-certs", *(["-passin", source] if source else []), path]
        run = _run(argv, secrets=settings.secrets)
        if run.killed():
            raise CMPError(run.killed())
        transaction.write("stored.pem", run.output)
        found = _certificates(transaction.file("stored.pem"), transaction.logger)
        if not found:  # not remembered: the pass phrase may be another one next time
            what = _one_line(path, 100)
            transaction.logger.warning("%s holds no certificate that can be read: make it PEM", what)
            return []
        _stored[mark] = found
    return _stored[mark]


# The chain is found in this order: `_chain`, which says what is missing; `PathFinder`, which tries the candidates and
# prefers (`rank`) a path to what the configuration trusts or names; `Links`, which lets openssl verify each link.
# Nothing is trusted because of where it stands: a certificate from extraCerts is served if openssl says that it has
# signed the one below, and no path through it is preferred to one that ends in the configuration.


class Pool(NamedTuple):
    """Where issuers are found."""

    anchors: list[Certificate]  # what the configuration trusts
    named: list[Certificate]  # what it names at all, and caPubs
    sent: list[Certificate]  # extraCerts, which nothing protects (RFC 4210, 5.1)


def _pool(transaction: Transaction) -> Pool:
    """Read the certificates that the configuration names, and those of the answer."""
    options, logger = transaction.settings.options, transaction.logger
    files = {o: _file_list(o, options.get(o) or "") for o in ("untrusted", "trusted", "out_trusted")}
    found = {o: [c for name in files[o] for c in _configured_certificates(name, transaction)] for o in files}
    anchors = found["trusted"] + found["out_trusted"]
    capubs = _certificates(transaction.file("capubs.pem"), logger)
    sent = _certificates(transaction.file("extracerts.pem"), logger)
    if not sent:  # openssl forgets them when the CA delays its answer to the confirmation
        sent = [cert for answer in transaction.answers() for cert in _message_certificates(answer.path, logger)]
    return Pool(anchors, [*found["untrusted"], *anchors, *capubs], sent)


def _message_certificates(path: str, logger: logging.Logger) -> list[Certificate]:
    """extraCerts and caPubs of a saved response (RFC 4210, 5.1 and 5.3.4)."""
    found = []
    try:
        with open(path, "rb") as file:
            _, body, *rest = _sequence(file.read(MAX_DER))
        capubs = _sequence(body.value)[:1] if body.tag & 0x1F in (IP, CP) else []
        for field in [*rest, *capubs]:
            if field.tag == 0xA1:
                found += [_certificate(element.raw) for element in _sequence(field.value)]
    except (CMPError, ValueError) as err:
        logger.debug("%s: %s", path, err)
    return found


def _names_as_issuer(below: Certificate, issuer: Certificate) -> bool:
    """Whether `below` names `issuer`, as far as it tells (RFC 5280, 4.2.1.1). Who has signed it is another question."""
    same_key = not below.authority_key or issuer.subject_key in (b"", below.authority_key)
    return same_key and _name_key(issuer.subject) == _name_key(below.issuer)


# Links that openssl has verified in this process: (what was signed, the issuer's certificate).
_links: set[tuple[bytes, bytes]] = set()


class Links:
    """Which certificate has signed which: openssl's answers, each asked for once, and of those only so many."""

    def __init__(self, transaction: Transaction) -> None:
        self.transaction, self.left, self.passed_over = transaction, MAX_LINKS, ""

    def verified(self, below: Certificate, issuer: Certificate, mark: bytes, protected: bool) -> bool:
        """Whether `issuer` has signed `below`; a yes is remembered as one for `mark`."""
        if (mark, issuer.der) in _links:
            return True
        if self.left <= 0:
            return False
        self.left -= 1
        logger, name = self.transaction.logger, _name_text(issuer.subject)
        try:
            run = self._run(below, issuer)
        except (CMPError, OSError) as err:  # no process, no descriptor, no room: the certificate is served all the same
            self.left = 0
            logger.warning("cannot verify the chain now: %s", _one_line(str(err)))
            return False
        if run.code == 0:
            if len(_links) > 1000:
                _links.clear()
            _links.add((mark, issuer.der))
            return True
        fault = FALSE_SIGNER.search(run.output)
        why = _one_line(fault.group(1) if fault else run.output)
        if below is issuer:
            pass  # it just is not self-signed
        elif protected:
            self.passed_over = f" (the {name} that is there has not signed it: {why})"
        else:
            self.left -= FALSE_LINK - 1
            logger.warning("passed over a false certificate in extraCerts: %s (%s)", name, why)
        return False

    def _run(self, below: Certificate, issuer: Certificate) -> Run:
        """Run `openssl verify` for one link. Raises CMPError where it gives no answer."""
        write, file = self.transaction.write, self.transaction.file
        write("issuer.pem", _pem(issuer.der))
        write("below.pem", _pem(below.der))
        argv = [self.transaction.settings.binary.path, "verify", "-partial_chain", "-no_check_time", "-ignore_critical"]
        argv += ["-check_ss_sig"] if below is issuer else []  # or else it just finds it among the trusted ones
        run = _run([*argv, "-trusted", file("issuer.pem"), file("below.pem")])
        if run.killed():
            raise CMPError(run.killed())
        return run


class Path(NamedTuple):
    """A way from the leaf upwards, and how good it is."""

    certificates: list[Certificate]
    rank: tuple[bool, bool, int]


class PathFinder:
    """Finds the chain of a certificate among those of a pool."""

    def __init__(self, pool: Pool, links: Links) -> None:
        self.pool, self.links, self.steps = pool, links, MAX_STEPS
        self.protected = {certificate.der for certificate in pool.named}
        self.anchors = {certificate.der for certificate in pool.anchors}
        self.anchor_keys = {(_name_key(a.subject), a.key) for a in pool.anchors}
        self.named_keys = {(_name_key(c.subject), c.key) for c in pool.named}

    def best(self, path: list[Certificate]) -> Path:
        """The best way on from the end of `path`: it is at the end itself where that is self-signed."""
        ends = self.self_signed(path)
        key, best = b"", Path([], (False, False, -1))
        self.steps -= 1
        for issuer, mark in [] if ends or len(path) == MAX_CHAIN or self.steps < 0 else self.candidates(path):
            # Where one key has signed, no other has: of the others only certificates of the same key are of use.
            if key in (b"", issuer.key) and self.links.verified(path[-1], issuer, mark, issuer.der in self.protected):
                key, found = issuer.key, self.best([*path, issuer])
                best = found if found.rank > best.rank else best
            if best.rank == (True, True, 2):
                break
        return best if best.certificates else Path(path, self.rank(path, ends))

    def rank(self, path: list[Certificate], ends: bool) -> tuple[bool, bool, int]:
        """What to prefer a path for: it ends at something protected, all is valid now, it ends at a trust anchor."""
        # In this order, for else the cross-certificate of a stranger would do better than an issuer that has expired.
        end, trust = (_name_key(path[-1].subject), path[-1].key), 0
        if self.anchors & {certificate.der for certificate in path} or (ends and end in self.anchor_keys):
            trust = 2  # also by a renewed certificate of the anchor, which has its name and key
        elif ends and end in self.named_keys:
            trust = 1
        return trust > 0, all(certificate.valid() for certificate in path[1:]), trust

    def self_signed(self, path: list[Certificate]) -> bool:
        """Whether the last one has signed itself: a CA below one of its own name has not, whatever it is called."""
        last = path[-1]
        if not _names_as_issuer(last, last):
            return False
        if last.authority_key and last.subject_key:
            return True
        return self.links.verified(last, last, last.der, True)

    def candidates(self, path: list[Certificate]) -> list[tuple[Certificate, bytes]]:
        """Who may have issued the last one, in the order to try them, and what to remember the link by."""
        last, trodden = path[-1], {(_name_key(c.subject), c.key) for c in path}
        pool = {c.der: c for c in [*self.pool.named, *self.pool.sent] if _names_as_issuer(last, c)}
        found = [c for c in pool.values() if (_name_key(c.subject), c.key) not in trodden]
        if len(found) > 1:
            # Stable: the configuration stays before caPubs, and these before extraCerts.
            found.sort(key=lambda c: (not c.valid(), c.der not in self.protected, not _named_by_hash(last, c)))
        # Authorities are the same again and again, a leaf hardly ever is. So its link is remembered by what it says of
        # its issuer's key, but only as long as no other key claims to be that one, and for this very issuer: a leaf of
        # the same authority then needs no process.
        sure = len(path) == 1 and last.authority_key and len({c.key for c in found}) == 1
        mark = last.algorithm + last.authority_key if sure else last.der
        return [(issuer, mark if issuer.subject_key else last.der) for issuer in found]


def _named_by_hash(below: Certificate, issuer: Certificate) -> bool:
    """Whether `below` names the issuer's key by its hash (RFC 5280, 4.2.1.2): nobody can make another of that name."""
    import hashlib  # only where several claim to be the issuer

    try:
        key = _sequence(issuer.key)[1].value[1:]  # without the number of unused bits
        return hashlib.sha1(key, usedforsecurity=False).digest() == below.authority_key
    except (CMPError, IndexError):
        return False


def _chain(leaf: Certificate, transaction: Transaction) -> list[Certificate]:
    """The leaf and its issuers in order, up to a self-signed one or as far as the pool goes (RFC 8555, 9.1).

    Whatever goes wrong here does not cost the certificate: what is verified is served, and the log says what is not.
    """
    warn = transaction.logger.warning
    try:
        pool = _pool(transaction)
        links = Links(transaction)
        finder = PathFinder(pool, links)
        path = finder.best([leaf])
        ends = finder.self_signed(path.certificates)
    except (CMPError, OSError) as err:
        warn("cannot look for the chain now: %s", _one_line(str(err)))
        return [leaf]
    chain = path.certificates
    top, missing = _name_text(chain[-1].subject), _name_text(chain[-1].issuer)
    roots = any(_names_as_issuer(named, named) for named in pool.named)
    if len(chain) == 1 and not ends:
        warn("the CA did not send the issuer's certificate: name it in cmp_untrusted%s", links.passed_over)
    elif len(chain) == MAX_CHAIN and not ends:
        warn("the bundle ends with %s: a chain of more than %d certificates is not followed", top, MAX_CHAIN)
    elif not ends and path.rank[2] < 2 and (roots or finder.candidates(chain)):  # else the root is left out on purpose
        what = f"name its issuer, {missing}, in cmp_untrusted{links.passed_over}"
        warn("the bundle ends with %s, below its root: %s", top, what)
    for authority in chain[1:]:
        if not authority.valid():
            name, limits = _name_text(authority.subject), f"{authority.not_before} to {authority.not_after}"
            warn("the bundle holds %s, valid only from %s: name its renewed certificate in cmp_untrusted", name, limits)
    return chain


# --- The certificate against its CSR ------------------------------------------------------------------------


def _common_names(subject: Name) -> set[str]:
    """The CNs that can be mistaken for a host's name or address, as subjectAltNames would have it."""
    texts = {(a.text or "").strip().lower() for rdn in subject for a in rdn if a.type == COMMON_NAME}
    return {text for text in texts if re.fullmatch(r"[^\s.@]+(\.[^\s.@]+)+|[0-9a-f]*:[0-9a-f:.]+", text)}


def _signs_certificates(extensions: Mapping[str, bytes]) -> bool:
    """Whether it is a CA's: cA in basicConstraints, or keyCertSign in keyUsage (RFC 5280, 4.2.1.9 and 4.2.1.3)."""
    flag = _sequence(extensions.get(BASIC_CONSTRAINTS, b"\x30\x00"))[:1]
    usage = next(_elements(extensions.get(KEY_USAGE, b"\x03\x01\x00"))).value
    return any(e.tag == 0x01 and any(e.value) for e in flag) or bool(usage[1:2] and usage[1] & 0x04)


def _same_key(one: bytes, other: bytes) -> bool:
    """Whether two subjectPublicKeyInfos hold the same key. Raises CMPError or IndexError where one is malformed.

    A CA may compress an EC point. Then its first octets say so, and the end of the longer form is missing.
    """
    keys = [_sequence(key)[1].value for key in (one, other)]
    shorter = min(map(len, keys))
    return keys[0][2:shorter] == keys[1][2:shorter]


def _changes(csr: CSR, leaf: Certificate, subject: str) -> str:
    """What the CA has made of a request that nobody has asked for, or an empty string.

    A CA may repeat a name of the subject as a subjectAltName, and the other way round. `subject` is what was sent as
    `-subject`, where the CSR has none.
    """
    try:
        asked, got = (
            {f"{kind}:{text.lower()}" for kind, text in _alternative_names(extensions)}
            for extensions in (csr.extensions, leaf.extensions)
        )
        authority = _signs_certificates(leaf.extensions)
        same_key = _same_key(leaf.key, csr.key)
    except (CMPError, IndexError, StopIteration) as err:
        return f"it cannot be compared with the CSR: {err}"
    asked_values, got_values = ({name.partition(":")[2] for name in names} for names in (asked, got))
    asked_names, got_names = _common_names(csr.subject), _common_names(leaf.subject)
    said = {(a.text or "").strip().lower() for rdn in csr.subject for a in rdn} | {""}
    said |= set(re.findall(r"=([^/=+]*)", subject.lower()))
    missing = sorted(asked - got)
    if not asked:
        missing = sorted(asked_names - got_values - got_names)
    added = sorted(name for name in got - asked if name.partition(":")[2] not in said)
    added += sorted(f"CN={name}" for name in got_names - asked_values - said)
    found = [f"{what} {', '.join(names)}" for what, names in (("missing", missing), ("added", added)) if names]
    if not same_key:
        found.append("another key")
    if authority:
        found.append("a CA certificate")
    return _one_line("; ".join(found), 2 * MAX_TEXT)


# --- openssl as a process -----------------------------------------------------------------------------------


class Binary(NamedTuple):
    """What an openssl program can do: `options` tells of each option of its `cmp` whether it takes a value."""

    path: str
    version: str
    options: dict[str, bool]
    spelled: dict[str, str]  # option -> how this program writes it
    fault: str = ""  # why it cannot serve an RA

    def margin(self) -> int:
        """The last seconds of -total_timeout, which openssl keeps for the answer to its last pollReq."""
        return 2 if self.since(3, 3) else 5

    def since(self, major: int, minor: int) -> bool:
        """Whether it is this version of OpenSSL or a later one."""
        number = OPENSSL.match(self.version)
        return number is not None and (int(number.group(1)), int(number.group(2))) >= (major, minor)

    def converts_csr(self) -> bool:
        """Whether `-csr` works with `-cmd ir`: since the release of 3.0; earlier only with p10cr."""
        number = OPENSSL.match(self.version)
        return self.since(3, 1) or (number is not None and self.since(3, 0) and not number.group(3))


NO_BINARY = Binary("", "", {}, {})
_binaries: dict[tuple[str, int, int], Binary] = {}  # asked once per process, and again when the file changes


def _binary(name: str) -> Binary:
    """Ask an openssl program for its version and the options of its `cmp`. Raises CMPError if it has none."""
    path = shutil.which(name)
    if path is None:
        raise CMPError(f"cmp_openssl_bin: {_one_line(name, 100)} is not an executable program")
    if sys.platform == "win32" and path.lower().endswith((".bat", ".cmd")):
        # Windows has cmd.exe run it, and that reads the subject of a CSR as a part of its command line.
        raise CMPError(f"cmp_openssl_bin: {path} is a batch file: name openssl.exe itself")
    info = os.stat(path)
    key = (os.path.abspath(path), info.st_mtime_ns, info.st_size)
    if key not in _binaries:
        run = _run([path, "cmp", "-help"])
        version = _run([path, "version"]) if run.code is not None else run
        if version.code is None:  # perhaps the machine is busy: that is not remembered
            raise CMPError(f"cmp_openssl_bin: {path}: {version.killed()}")
        found = OPTION.findall(run.output)
        spelled = {_option_name(option): option for option, _ in found}
        options = {_option_name(option): bool(value) for option, value in found}
        fault = "" if options.keys() >= {"cmd", "server"} else _no_cmp(run)
        if ONLY_PRIVATE_KEYS.search(run.output):
            fault = (
                "takes only a private key for -newkey, and the ACME client's stays with the client: install OpenSSL 3"
            )
        asked = Binary(path, _one_line(version.output.partition("(")[0], 60), options, spelled, fault)
        if not asked.converts_csr():  # it replays answers under another transactionID, so it cannot go on from them
            options.pop("rspin", None)
        _binaries[key] = asked
    binary = _binaries[key]
    if binary.fault:
        raise CMPError(f"cmp_openssl_bin: {path} ({binary.version or 'unknown'}) {binary.fault}")
    return binary


def _no_cmp(run: Run) -> str:
    """Why `openssl cmp -help` shows no options: too old, or it cannot start (a broken openssl.cnf, a library)."""
    said = run.killed() or _one_line("; ".join(m.text for m in _messages(run.output) if m.level != "info"))
    if run.code == 0 or not said or NO_COMMAND.search(said):
        return "has no cmp command: install OpenSSL 3"
    return f"cannot run its cmp command: {said}: repair that, then restart acme2certifier"


LOST = 256  # no exit code


class Message(NamedTuple):
    """One message of openssl, on one line."""

    level: str
    text: str


class Run(NamedTuple):
    """How a program ended. `code` is None where it was killed or left asleep, LOST where nobody knows."""

    code: int | None
    output: str
    messages: Sequence[Message] = ()  # openssl cmp's
    cut: bool = False  # it said more than is kept
    asleep: bool = False  # ended by us while it slept: nothing was in flight
    words: Sequence[str] = ()  # texts in the saved answers

    def errors(self) -> list[str]:
        """The texts of openssl's error messages, each once."""
        return list(dict.fromkeys(m.text for m in self.messages if m.level in ("fatal", "alert", "critical", "error")))

    def complete(self) -> bool:
        """Whether it ended by itself, and all that it said is here: only then a missing line tells anything."""
        return self.code is not None and 0 <= self.code < LOST and not self.cut and not self.asleep

    def only(self, lines: re.Pattern[str]) -> bool:
        """Whether it has said why it failed, and every line of that is one of these.

        Who is on the way to the CA can add lines (by the names in his certificate, by HTTP headers), but cannot take
        one away. The CA's own text may hold line breaks, too. It is put on one line, but only where openssl prints it
        (in quotes, or at the end of a line), and not if it holds openssl's words for an answer that is not accepted:
        else he would send a text that makes these lines disappear.
        """
        output = self.output
        for text in self.words:
            if not REFUSED_MESSAGE.search(text):
                for before, after in AROUND_TEXTS:
                    output = output.replace(before + text + after, before + " ".join(text.split()) + after)
        run = self._replace(messages=_messages(output))
        errors = [error for error in run.errors() if not POLLING_FAILED.match(error)]
        sender = any(OTHER_SENDER.search(message.text) for message in run.messages)
        return self.complete() and bool(errors) and all(map(lines.match, errors)) and not sender

    def killed(self) -> str:
        """How it was killed, or an empty string."""
        if self.code is None:
            return "openssl did not end in time and was killed"
        if self.code == LOST:
            return "nobody knows how openssl ended: something in this process waits for the children of others"
        return f"openssl was killed by signal {-self.code}" if self.code < 0 else ""


def _run(
    argv: Sequence[str],
    limit: float = 10,
    secrets: Mapping[str, str] | None = None,
    keep: Sequence[int] = (),
    asleep: Callable[[], bool] = lambda: False,
) -> Run:
    """Run a program and collect what it says; kill it, with all that it started, after `limit` seconds.

    `secrets` are added to its environment, the file descriptors `keep` are inherited. `asleep` is asked whenever the
    program has said something, and from time to time: where it says yes, the program is ended as well.
    """
    if sys.platform != "win32" and signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        raise CMPError("this process ignores SIGCHLD, so nobody can know how openssl ends: use another web server")
    try:
        child = _start(argv, secrets or {}, keep)
    except (OSError, ValueError) as err:
        raise CMPError(f"cannot run {argv[0]}: {getattr(err, 'strerror', None) or err}") from err
    output, cut, ended, deadline = b"", False, False, time.monotonic() + limit
    with child.output as pipe:
        try:
            # Reading to the end of the pipe, then waiting, costs less than subprocess's own timeout does.
            while not ended and time.monotonic() < deadline:
                if _readable(pipe, min(max(0, deadline - time.monotonic()), TICK)):
                    chunk = os.read(pipe.fileno(), 65536)
                    if not chunk:
                        break
                    cut = cut or len(output) + len(chunk) > MAX_OUTPUT
                    output = (output + chunk)[:MAX_OUTPUT]
                ended = asleep()
            tries = 0
            while not ended and _exit_code(child.process) is None and time.monotonic() < deadline:
                tries += 1  # it has closed its output, so it ends at once; or else it is a strange program
                time.sleep(0 if tries < 100 else 0.01)
        finally:
            code = _exit_code(child.process)
            _kill(child)
    text = output.decode("utf-8", "replace").replace("\r\n", "\n")  # as a program made for Windows ends them
    # Where it has ended by itself meanwhile, its last words are not read any more: that is no complete run either.
    return Run(None if ended else code, text, cut=cut, asleep=ended)


def _messages(output: str, secrets: Collection[str] = (), words: Collection[str] = ()) -> list[Message]:
    """openssl's messages. What is no message of its log (a certificate's details, say) gets the level debug.

    `words` are texts from the saved answers, which openssl prints as they are: in the log they are on one line.
    """
    for text in words:
        output = output.replace(text, " ".join(text.split())) if text.strip() else output
    messages: list[Message] = []
    for line in output.split("\n"):
        match = MESSAGE.match(line)
        level, text = (match.group(1).lower(), match.group(2)) if match else ("debug", QUEUE.sub(r"\1 \2", line))
        # The CA knows the shared secret and could send it back, so it is masked where the text is not openssl's own.
        own, mark, other = text.partition(":") if match else ("", "", text)
        if text.strip():
            messages.append(Message(level, _one_line(own) + mark + _foreign(other, secrets, 2 * MAX_TEXT)))
    return messages


def _foreign(text: str, secrets: Collection[str], limit: int = MAX_TEXT) -> str:
    """Somebody else's text for a log line or an error: secrets masked, on one line, and only then cut."""
    return _one_line(_hide(text, secrets), limit)


def _log_messages(logger: logging.Logger, messages: Sequence[Message], expected: str = "") -> None:
    """Hand openssl's messages to the log, each at its own level, but what is `expected` at the lowest."""
    levels = {"warning": logging.WARNING, "info": logging.INFO, "note": logging.INFO}
    if len(messages) > MAX_MESSAGES:  # a stranger's certificate may hold any number of lines
        logger.warning("openssl cmp: %s of its %s messages left out", len(messages) - MAX_MESSAGES, len(messages))
    for level, text in [*messages[: MAX_MESSAGES // 2], *messages[MAX_MESSAGES // 2 :][-MAX_MESSAGES // 2 :]]:
        usual = ONE_WAY_TLS.match(text) or (expected and re.match(expected, text, re.I))
        lowest = level in ("debug", "trace") or usual
        logger.log(logging.DEBUG if lowest else levels.get(level, logging.ERROR), "openssl cmp: %s", text)


def _hint(searched: str) -> str:
    """The first hint that fits, in brackets, or an empty string."""
    return next((f" ({hint})" for words, hint in HINTS if re.search(words, searched, re.I)), "")


# --- openssl's words -----------------------------------------------------------------------------------------

# All texts of openssl that this file looks for, but the lists that `_known_types` reads. Where a new version has other
# words for one of them, test_hints.py or test_verdict.py fails with it, and this is the place to change.

# cmpossl of 2019 has its levels in capitals.
MESSAGE = re.compile(r"^(?:[\w./:-]*:)?CMP (fatal|alert|critical|error|warning|note|info|debug|trace): ?(.*)$", re.I)
QUEUE = re.compile(r"^[0-9A-F]+:error:[^:]*:[^:]*:[^:]*:([^:]*):[^:]*:\d+:(.*)$")  # openssl's error queue, as printed

# Error lines that openssl prints only after it has accepted the newest message.
ACCEPTED = re.compile(
    r"received error(?!:code=)|unexpected pkistatus|unknown pkistatus|error parsing pkistatus"
    '|received "rejection" status|request rejected by server|received unsupported PKIStatus|unexpected pkibody'
    "|encountered keyupdatewarning|certificate not found|certresponse not found|multiple responses"
    "|Did not receive response",
    re.I,
)
# The same, about a certificate that the CA has issued, but openssl does not take: another key, or cmp_out_trusted.
LEAF_NOT_ACCEPTED = re.compile("certificate not accepted")
LEAF_REFUSED = re.compile(
    f"{LEAF_NOT_ACCEPTED.pattern}|failed to validate newly enrolled|rejecting newly enrolled|different key types"
    "|key type mismatch|key values mismatch|certificate verification failed",
    re.I,
)
AFTER_ACCEPTANCE = re.compile(f"{ACCEPTED.pattern}|{LEAF_REFUSED.pattern}", re.I)
# Lines that say no more than that the time is up while the CA lets us wait.
TIME_IS_UP = re.compile("total timeout", re.I)
# Lines about a pollRep that openssl has accepted, but cannot wait as long as, or as short as, it says.
POLLREP_TAKEN = re.compile("total timeout|checkafter out of range|bad checkafter in pollrep|too (large|small)$", re.I)
# Words of an answer that is not accepted, as somebody could put them into a text of his own.
REFUSED_MESSAGE = re.compile("protection|pbm|verif|sender|unmatched|pvno|missing|algorithm", re.I)
# What stands around the texts of an answer.
AROUND_TEXTS = (('"', '"'), ("errorDetails: ", "\n"))
# A sender that is not cmp_expect_sender: for OpenSSL 3.0 no error.
OTHER_SENDER = re.compile("does not match expected sender")
# It stands beside the errors of a poll, and says nothing by itself.
POLLING_FAILED = re.compile("polling failed")
# The end of a run that only has to see what was saved, or of one that the CA lets wait: no errors for the log.
END_OF_REPLAY, END_OF_WAIT = "-server option|too few -rspin", f"{TIME_IS_UP.pattern}|{POLLING_FAILED.pattern}"
CONNECT_TIMEOUT = re.compile("connect timeout")
# What an HTTP server may write is not searched for hints, or they would be its choice.
HTTP_WORDS = re.compile("(reason=|actual=|content=|input=|Content-Type: ).*")
# The first error where openssl has not even begun. Then the cause is no message of its log, but a line like these.
NOT_BEGUN = re.compile("cannot set up cmp context", re.I)
CAUSE = re.compile("(?!.*config file).*(error|unable|could not|cannot|unknown|no |not match|incorrect|not found)", re.I)
# OpenSSL 3.5 and later warn of it at each run, though TLS without a client certificate is nothing unusual.
ONE_WAY_TLS = re.compile("-tls_used given without -tls_key;")
# For `check --connect` and `cacerts`.
TLS_FAILED = re.compile("error sending|connect|timeout|certificate verif|handshake|alert", re.I)
WILL_CONTACT = re.compile("will contact (.*)", re.I)
NO_ANSWER_TO_GENM = re.compile("Did not receive response")
NO_CA_CERTS = re.compile("does not include suitable value")
# For other commands than cmp.
SIGNATURE_FITS = re.compile(r"^(Certificate request self-signature )?verify OK$", re.M)
SIGNATURE_WRONG = re.compile("verify failure")
FALSE_SIGNER = re.compile("lookup: *(.*)")
NO_COMMAND = re.compile("invalid command", re.I)
OPTION = re.compile(r"^ -([\w-]+)(?: (\S+))?(?:  .*)?$", re.M)  # a value's type stands one blank behind the name
OPENSSL = re.compile(r"OpenSSL (\d+)\.(\d+)\.\d+(-(?:alpha|beta|dev|pre))?")
PUBLIC_KEY = re.compile("-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----\n", re.S)
NO_EXTENSIONS = "No ext"
KEY_USES = re.compile(r"X509v3 Key Usage:.*\n(.*)")
EXTENDED_KEY_USES = re.compile(r"X509v3 Extended Key Usage:.*\n(.*)")
FOR_SIGNATURES, FOR_CLIENTS = re.compile("Digital Signature"), re.compile("Client Auth|Any Ext")
ONLY_PRIVATE_KEYS = re.compile(r"^ -newkey \S+ +Private key", re.M)

# What openssl says (a regular expression) -> what to do. The first one that fits counts, so special ones come first.
# A test holds docs/troubleshooting.md to the same list.
HINTS = (
    ("certificate verify failed", "cmp_tls_trusted must hold the issuer of the TLS certificate, cmp_tls_host its name"),
    (
        "failed to validate newly enrolled",
        "cmp_out_trusted must hold the root of the certificates that the CA issues, cmp_untrusted their intermediates",
    ),
    ("does not match the TLS certificate", "cmp_tls_key does not belong to cmp_tls_cert"),
    (
        "TLS client private key",
        "check cmp_tls_key and cmp_tls_keypass, and for a token its name, the PIN and that openssl finds the module",
    ),
    ("wrong pbm value", "the shared secret does not fit: check cmp_ref and cmp_secret"),
    (
        "missing protection",
        "the answer is not protected; many CAs answer so if they do not accept the credentials: check cmp_ref and"
        " cmp_secret, or cmp_cert and cmp_key",
    ),
    (
        "unable to get local issuer certificate",
        "cmp_trusted must hold the root of the CMP server's certificate, and cmp_untrusted its intermediates",
    ),
    (
        "unable to get issuer certificate",
        "cmp_trusted holds an intermediate: add its root, or set cmp_partial_chain: True",
    ),
    ("self-signed certificate", "cmp_trusted must hold the CA's own root certificate"),
    ("missing key usage digitalSignature", "set cmp_ignore_keyusage: True if the CA's signer is like that"),
    ("expected sender", "cmp_expect_sender does not fit the sender of the answer"),
    ("srvcert does not validate", "cmp_srvcert is not the certificate that signs the CA's answers"),
    ("missing trust", "the answer is signed: set cmp_trusted to its root, and cmp_expect_sender"),
    (
        "no suitable sender cert",
        "the CA did not send the certificate that signed its answer: name it in cmp_untrusted, with its intermediates,"
        " or in cmp_srvcert",
    ),
    (
        "recipnonce unmatched",
        "the answer is to another request: somebody repeats it, or the CA delays it as RFC 9483 (4.4) has it, which"
        " OpenSSL 3.0 does not understand and 3.5 does",
    ),
    ("transactionid unmatched", "the answer is of another transaction: does something on the way mix up answers?"),
    (
        "unexpected pvno",
        "the CA speaks another version of CMP than 2 (RFC 4210), which openssl wants: ask for another cmp_path",
    ),
    ("checkafter", "the CA gives no usable number of seconds after which to ask again: ask its operator"),
    ("connect timeout", "nothing answers there: check cmp_server, the firewall and that the CMP service runs"),
    ("transfer timeout", "no answer in time: the CA is slow (raise cmp_msg_timeout) or it is no CMP server"),
    (
        "code=401|http code 401",
        "the web server wants a user and password, which openssl cmp cannot send: let it take CMP requests without",
    ),
    (
        "code=403|http code 403",
        "the web server does not let this machine in: check cmp_path, its rules of access, and cmp_tls_cert",
    ),
    ("code=404|http code 404", "no CMP service under this path: check cmp_path"),
    (
        "code=407|http code 407",
        "the proxy wants a user and password, which openssl cmp cannot send: let it pass this machine, or set"
        " cmp_no_proxy",
    ),
    (
        "code=413|http code 413",
        "the web server takes no request of this size: raise its limit (nginx: client_max_body_size)",
    ),
    ("code=500|http code 500", "the server failed: look into its log"),
    (
        "code=405|code=501|http code 405|http code 501",
        "a web server that takes no CMP requests: check cmp_server and cmp_path",
    ),
    (
        "code=502|code=503|code=504|http code 502|http code 503|http code 504|connect failure",
        "a proxy on the way cannot reach the CMP server, or may not, or the server is busy: check cmp_server, and the"
        " proxy",
    ),
    (
        "missing content type",
        "the server sends no Content-Type, or a proxy sends its header in pieces, which openssl with time-outs cannot"
        " read: set cmp_msg_timeout: 0 and cmp_total_timeout: 0",
    ),
    (
        "unexpected content type|content type mismatch",
        "check cmp_server and cmp_path; a CMP server must send application/pkixcmp, for OpenSSL 3.0 without a charset",
    ),
    ("header parse error", "that is no HTTP server: check cmp_server, and cmp_tls_used if it expects TLS"),
    ("wrong version number", "the server does not speak TLS on this port: check cmp_server and cmp_tls_used"),
    (
        "failed reading data|error sending",
        "the connection was closed: check cmp_tls_used, cmp_tls_cert if the server wants one, and the CA's log",
    ),
    ("redirection not enabled", "the server redirects: set cmp_server and cmp_path to the final address"),
    ("max resp len exceeded", "the answer is too large to be CMP: check cmp_server and cmp_path"),
    ("nested asn1 error|missing asn1 encoding", "the answer is no CMP message: check cmp_server and cmp_path"),
    ("does not match our enrollment key", "the CA issued for another key: look into the CA's log"),
    (
        "badMessageCheck",
        "the CA could not verify the request: check cmp_ref and cmp_secret (a CA by RFC 9483 also wants a cmp_cert with"
        " the subject CN=cmp_ref), or cmp_cert and cmp_key",
    ),
    (
        "wrongIntegrity",
        "the CA wants the other kind of credentials: cmp_cert and cmp_key in place of cmp_ref and cmp_secret, or the"
        " reverse",
    ),
    (
        "signerNotTrusted",
        "the CA does not trust the certificate in cmp_cert: register it there, send its intermediates (cmp_extracerts)",
    ),
    ("notAuthorized", "the CA does not let this RA do that: check the RA's rights at the CA"),
    ("badPOP", "let the CA accept raVerified from this RA, or set cmp_cmd: p10cr (some CAs drop names then)"),
    (
        "badCertTemplate",
        "the CA refuses the subject, a name or an extension: compare them with its profile, or set cmp_profile",
    ),
    (
        "unacceptedExtension",
        "the CA refuses an extension of the CSR: let the client ask for less, or change the CA's profile",
    ),
    ("badAlg", "try cmp_digest: sha256, with a secret cmp_mac: hmacWithSHA256 too, else cmp_cert"),
    ("badTime", "the clocks of this machine and of the CA differ: set them"),
    ("badDataFormat", "the CA cannot read the request: check cmp_path, then look into the CA's log"),
    (
        "badRecipientNonce|badSenderNonce",
        "an answer got lost, or two servers share a transaction: order again; raise cmp_msg_timeout if it comes back",
    ),
    (
        "transactionIdInUse",
        "the CA has got this request twice: does a proxy on the way repeat it? Order the certificate again",
    ),
    (
        "duplicateCertReq",
        "the CA has such a request or certificate already: finish it there, or let the client make a new key",
    ),
    ("systemUnavail|systemFailure", "the CA cannot work now: ask its operator, and try again later"),
    (
        "PKIStatus: waiting",
        "the CA says that it waits, which OpenSSL understands for an enrolment only, before 3.3 not in each answer",
    ),
    ("wrongAuthority", "check cmp_recipient and cmp_issuer"),
    ("cert and key do not match", "cmp_key does not belong to cmp_cert"),
    (
        "unsupported key type",
        "this openssl cannot sign with such a key (Ed25519 needs OpenSSL 3.5): use an RSA or EC key for cmp_cert",
    ),
    (
        "cannot use the CSR",
        "the CSR is damaged, or its key is of a kind that is newer than this openssl (ML-DSA needs OpenSSL 3.5)",
    ),
    ("bad decrypt", "the pass phrase does not fit the key: check cmp_keypass"),
    ("PIN incorrect", "check cmp_keypass, or the pin-source in cmp_key: a token locks itself after a few wrong PINs"),
    (
        "object not found|could not find private key|could not read private key",
        "there is no such key, or of a kind that this openssl does not know: check cmp_key, and for a token its name,"
        " the PIN and that openssl finds the module",
    ),
    ("No space left on device", "make room on the disk of cmp_tmp_dir"),
)
OS_HINTS = {
    errno.ENOSPC: "make room on the disk of cmp_tmp_dir",
    errno.EDQUOT: "make room on the disk of cmp_tmp_dir",
    errno.EMFILE: "raise the limit of open files of this process",
    errno.ENFILE: "raise the system's limit of open files",
    errno.EROFS: "cmp_tmp_dir must be on a file system that can be written",
    errno.ENOLCK: "the file system of cmp_tmp_dir must support flock",
}


def _one_line(text: str, limit: int = MAX_TEXT) -> str:
    """`text` on one line, cut, without control characters: nobody's text may forge a log line, or hide one."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text[: limit * 8])
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _utf8(text: str) -> str:
    """`text` as Python hands it to the system in UTF-8, whatever the locale: openssl's arguments, names of files."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def _did_you_mean(word: str, known: Iterable[str], prefix: str) -> str:
    """The end of an error about an unknown `word`: the nearest known one, if any is near."""
    import difflib  # only needed for a typo

    return "".join(f"; did you mean {prefix}{near}?" for near in difflib.get_close_matches(word, sorted(known), 1, 0.5))


# --- DER: a few lines that read tags, lengths and names; openssl verifies -----------------------------------


class Element(NamedTuple):
    """One DER element: tag, contents, and the whole encoding."""

    tag: int
    value: bytes
    raw: bytes


def _elements(data: bytes, strict: bool = False) -> Iterator[Element]:
    """The DER elements that `data` consists of. Raises CMPError where it is not DER.

    A length with more octets than it needs is BER, and let pass unless `strict`.
    """
    start = 0
    while start < len(data):
        if len(data) - start < 2 or data[start] & 0x1F == 0x1F:
            raise CMPError("malformed DER")
        begin, length = start + 2, data[start + 1]
        if length & 0x80:
            octets = length & 0x7F
            if not 1 <= octets <= 4:  # 0x80 is the indefinite form of BER
                raise CMPError("malformed DER")
            length = int.from_bytes(data[begin : begin + octets], "big")
            if strict and (length < 0x80 or not data[begin]):
                raise CMPError("a length in it is BER, not DER")
            begin += octets
        end = begin + length
        if end > len(data):
            raise CMPError("DER cut short")
        yield Element(data[start], data[begin:end], data[start:end])
        start = end


def _sequence(data: bytes) -> list[Element]:
    """The elements in the one SEQUENCE that `data` is."""
    outer = list(_elements(data))
    if len(outer) != 1 or outer[0].tag != 0x30:
        raise CMPError("not one DER sequence")
    return list(_elements(outer[0].value))


def _check_der(data: bytes, values: bool, depth: int = 0) -> None:
    """Raise CMPError unless `data` is DER all the way down (X.690, 10 and 11), with `values` to the last octet.

    Of BER, or of a string with octets that are none of its characters, two programs read two things.
    """
    for tag, value, _ in _elements(data, strict=True):
        constructed = bool(tag & 0x20)
        if tag < 0x40 and constructed != (tag & 0x1F in (0x10, 0x11)):
            raise CMPError(f"tag {tag:#04x} in it is BER, not DER")
        if constructed:
            if depth > 20:
                raise CMPError("it is nested too deeply")
            _check_der(value, values, depth + 1)
        elif (values or tag == 0x06) and not _is_der_value(tag, value):
            raise CMPError(f"a value with tag {tag:#04x} in it is not DER")


def _is_der_value(tag: int, value: bytes) -> bool:
    """Whether these are the contents of a primitive DER element; True for a tag that has no rules here."""
    if tag in STRINGS:
        try:
            return bool(value.decode(STRINGS[tag]) or not value)
        except UnicodeDecodeError:
            return False
    if tag == 0x01:
        return value in (b"\x00", b"\xff")
    if tag in (0x02, 0x0A):  # INTEGER: the first nine bits are not all the same
        return len(value) == 1 or (len(value) > 1 and value[0] << 1 | value[1] >> 7 not in (0, 0x1FF))
    if tag == 0x03:  # BIT STRING: the unused bits are zero
        unused = value[0] if value else 8
        return unused < 8 and not (value[-1] & (1 << unused) - 1 if len(value) > 1 else unused)
    if tag == 0x05:
        return not value
    if tag == 0x06:  # the last octet ends a number, none begins with zeros
        return 0 < len(value) < 64 and value[-1] < 0x80 and not re.search(rb"(^|[\x00-\x7f])\x80", value, re.S)
    return True


def _oid(value: bytes) -> str:
    """An object identifier in dotted form."""
    numbers, number = [], 0
    for octet in value if len(value) < 64 else b"":  # no real one is longer, and the numbers would be huge
        number = number << 7 | octet & 0x7F
        if not octet & 0x80:
            numbers.append(number)
            number = 0
    first = min(numbers[0] // 40, 2) if numbers else 0
    return ".".join(str(n) for n in [first, numbers[0] - 40 * first, *numbers[1:]]) if numbers else ""


class Attribute(NamedTuple):
    """One attribute of a distinguished name; `text` is None where the value is not a readable string."""

    type: str
    tag: int
    text: str | None
    raw: bytes


Name = list[list[Attribute]]


def _name(raw: bytes) -> Name:
    """A distinguished name (RFC 5280, 4.1.2.4): a list of RDNs, each a list of attributes."""
    name: Name = []
    for rdn in _sequence(raw):
        attributes = []
        for pair in _elements(rdn.value):
            kind, value = _sequence(pair.raw)[:2]
            try:
                text: str | None = value.value.decode(STRINGS[value.tag])
            except (KeyError, UnicodeDecodeError):
                text = None
            attributes.append(Attribute(_oid(kind.value), value.tag, text, value.value))
        name.append(attributes)
    return name


def _name_key(name: Name) -> tuple[frozenset[tuple[str, Any]], ...]:
    """Something to compare names by: case, white space and string type do not count (RFC 5280, 7.1)."""
    return tuple(
        frozenset((a.type, a.raw if a.text is None else " ".join(a.text.casefold().split())) for a in rdn)
        for rdn in name
    )


def _name_text(name: Name) -> str:
    """A name for people, in RFC 4514's notation but in the order of the certificate."""
    rdns = []
    for rdn in name:
        pairs = []
        for a in rdn:
            value = "#" + a.raw.hex() if a.text is None else re.sub(r'([,+"\\<>;=])', r"\\\1", a.text)
            pairs.append(f"{ATTRIBUTES[a.type][0] if a.type in ATTRIBUTES else a.type}={value}")
        rdns.append("+".join(pairs))
    return _one_line(", ".join(rdns)) or "(empty)"


def _slash_form(name: Name, exact: bool) -> str | None:
    """`name` for `-subject`, None where that cannot carry it, or, with `exact`, not to the very same bytes."""
    text = ""
    for rdn in name:
        if exact and len(rdn) > 1:  # openssl would sort its attributes
            return None
        for position, a in enumerate(rdn):
            if a.type not in ATTRIBUTES or not a.text or not a.text.isprintable():
                return None
            short, tag, longest = ATTRIBUTES[a.type]
            if len(a.text) > longest or (exact and a.tag != tag) or (short == "C" and len(a.text) != longest):
                return None
            text += ("+" if position else "/") + short + "=" + re.sub(r"([\\/+=])", r"\\\1", a.text)
    return text


def _extensions(raw: bytes) -> dict[str, bytes]:
    """extnID -> contents of extnValue, from the DER of an Extensions SEQUENCE (RFC 5280, 4.1)."""
    extensions = {}
    for extension in _sequence(raw):
        fields = _sequence(extension.raw)
        extensions[_oid(fields[0].value)] = fields[-1].value
    return extensions


class Certificate(NamedTuple):
    """What the chain, the comparison with the CSR and the log need to know of a certificate."""

    der: bytes
    serial: str  # in hexadecimal
    algorithm: bytes  # that it is signed with
    issuer: Name
    not_before: str  # such as 2026-11-25T17:21:19Z: these compare like times
    not_after: str
    subject: Name
    key: bytes  # the subjectPublicKeyInfo
    extensions: dict[str, bytes]
    subject_key: bytes  # identifier of its key
    authority_key: bytes  # of the key that has signed it

    def valid(self) -> bool:
        """Whether it is valid now."""
        return self.not_before <= time.strftime(ISO_TIME, time.gmtime()) <= self.not_after


ISO_TIME = "%Y-%m-%dT%H:%M:%SZ"


def _time(element: Element) -> str:
    """UTCTime or GeneralizedTime (RFC 5280, 4.1.2.5) as ISO 8601 has it."""
    text = element.value.decode("ascii", "replace")
    if element.tag == 0x17:  # two digits of the year: 50 is 1950
        text = ("19" if text[:2] >= "50" else "20") + text
    return _one_line(re.sub(r"^(....)(..)(..)(..)(..)(..)", r"\1-\2-\3T\4:\5:\6", text), 40)


def _serial(value: bytes) -> str:
    return _one_line(f"{int.from_bytes(value, 'big', signed=True):x}", 64)


@functools.lru_cache(maxsize=512)  # the same few authorities come with every certificate
def _certificate(der: bytes) -> Certificate:
    """Read a certificate (RFC 5280, 4.1). Raises CMPError where it is none."""
    try:
        fields = _sequence(_sequence(der)[0].raw)
        if fields[0].tag == 0xA0:  # version
            fields.pop(0)
        serial, algorithm, issuer, validity, subject, key = fields[:6]
        start, end = map(_time, _sequence(validity.raw))
        about = (_serial(serial.value), algorithm.raw, _name(issuer.raw), start, end, _name(subject.raw), key.raw)
        try:
            extensions = _extensions(fields[-1].value) if fields[-1].tag == 0xA3 else {}
            identifiers = _key_identifiers(extensions)
        except (CMPError, IndexError, ValueError, StopIteration):  # openssl has accepted it, so it is served
            extensions, identifiers = {}, (b"", b"")
        return Certificate(der, *about, extensions, *identifiers)
    except (IndexError, ValueError) as err:
        raise CMPError("not an X.509 certificate") from err


def _key_identifiers(extensions: Mapping[str, bytes]) -> tuple[bytes, bytes]:
    """subjectKeyIdentifier, and the keyIdentifier of authorityKeyIdentifier (RFC 5280, 4.2.1.1)."""
    subject_key = next(_elements(extensions.get(SUBJECT_KEY_ID, b"\x04\x00"))).value
    fields = {field.tag: field.value for field in _sequence(extensions.get(AUTHORITY_KEY_ID, b"\x30\x00"))}
    return subject_key, fields.get(0x80, b"")


def _pem(der: bytes, label: str = "CERTIFICATE") -> str:
    text = base64.b64encode(der).decode()
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""])


def _decode(argument: object, label: str) -> bytes:
    """The DER in base64url or base64, with or without padding, or in PEM. Raises CMPError where there is none."""
    text = argument.decode("ascii", "replace") if isinstance(argument, bytes) else argument
    if not isinstance(text, str) or not text.strip():
        raise CMPError("it is empty")
    if len(text) > MAX_DER * 4 // 3 + MAX_DER // 32:  # in base64, with line breaks
        raise CMPError(f"it is larger than {MAX_DER} bytes")
    # Not anywhere: base64url may spell it, and acme2certifier would read it otherwise.
    if text.lstrip().startswith("-----BEGIN"):
        match = re.search(rf"-----BEGIN {label}-----([^-]*)-----END", text)
        if not match:
            raise CMPError("it is PEM of another kind")
        text = match.group(1)
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    if not re.fullmatch(r"[A-Za-z0-9+/]*", text):
        raise CMPError("it is not base64")
    try:
        der = base64.b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as err:
        raise CMPError("it is not base64, or cut short") from err
    _sequence(der)
    return der


# --- What differs between operating systems ------------------------------------------------------------------

if sys.platform == "win32":
    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)


def _default_directory() -> str:
    """Where transactions live if cmp_tmp_dir does not say: a directory of this user's."""
    import tempfile  # takes longer to import than this file does

    if sys.platform == "win32":
        user = re.sub(r"\W", "-", os.environ.get("USERNAME", ""))
    else:
        user = str(os.getuid())
    return os.path.join(tempfile.gettempdir(), f"cmp_ca_handler-{user}")


def _openssl_path(path: str) -> str:
    """`path` as openssl takes it in a list of files: a backslash quotes there."""
    return path.replace("\\", "/") if os.sep == "\\" else path


def _writable_by_others(path: str) -> str:
    """Who else may change this directory or link, as the end of an error, or nothing. Windows tells only by ACLs."""
    if sys.platform == "win32":
        return ""
    info = os.lstat(path)
    if info.st_uid not in (os.geteuid(), 0):
        what = f"run this as {_user(info.st_uid)}" if os.geteuid() == 0 else "give it to the user of acme2certifier"
        return f"belongs to another user: {what}"
    if stat.S_ISDIR(info.st_mode) and info.st_mode & 0o002 and not info.st_mode & 0o1000:
        return "can be written by every local user: chmod o-w"
    return ""


def _user(number: int | None = None) -> str:
    """The name of a user, or of the one who runs this process."""
    if sys.platform == "win32":
        return os.environ.get("USERNAME", "this user")
    import pwd  # only for an error

    try:
        return pwd.getpwuid(os.geteuid() if number is None else number).pw_name
    except KeyError:
        return f"user {os.geteuid() if number is None else number}"


def _disk_full(path: str) -> bool:
    """Whether there is no room for the CA's answers."""
    if sys.platform == "win32":
        return shutil.disk_usage(path).free < MAX_DER
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize < MAX_DER or (disk.f_files > 0 and disk.f_favail < 8)


def _sync(path: str) -> None:
    """Wait until a file, or the names in a directory, are on the disk. Windows has no way to say the second."""
    if sys.platform == "win32" and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as err:
        if err.errno != errno.EINVAL:  # of a file system that has no fsync for directories
            raise
    finally:
        os.close(descriptor)


def _locked(path: str, new: bool = False) -> int:
    """A descriptor of a lock file that we hold, until this process ends. Raises BlockingIOError where another does."""
    lock = _open_lock(path, new)
    try:
        if sys.platform == "win32":
            try:
                msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
            except OSError as err:
                raise BlockingIOError from err
        else:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _open_lock(path: str, new: bool) -> int:
    """Open a lock file, or make it. Nobody follows a link there, and all may delete it while it is open."""
    if sys.platform == "win32":  # Python's own functions do not share a file for deletion
        access, share, disposition, flags = -0x40000000, 7, 1 if new else 3, 0x00200000  # read and write, all, no link
        handle = _kernel32.CreateFileW(path, access, share, None, disposition, flags, None)
        if handle == -1:
            code = ctypes.get_last_error()
            raise ctypes.WinError(2 if code == 5 else code)  # "access denied": it is being deleted
        return msvcrt.open_osfhandle(handle, os.O_RDWR)
    return _above_2(os.open(path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if new else 0), 0o600))


def _above_2(descriptor: int) -> int:
    """The descriptor, moved where openssl's standard files do not take its place: the server's may be closed."""
    if sys.platform != "win32" and descriptor <= 2:
        try:
            return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
        finally:
            os.close(descriptor)
    return descriptor


def _unlock(descriptor: int) -> None:
    """Let go of the lock, for all who have inherited it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # when acme2certifier's process forked
    finally:
        os.close(descriptor)


class Child(NamedTuple):
    """A running program, with all that it starts: a process group, or on Windows a job."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    job: int = 0


def _start(argv: Sequence[str], secrets: Mapping[str, str], keep: Sequence[int]) -> Child:
    """Start a program that reads nothing, with `secrets` added to its environment. It inherits `keep`, if it can."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process: subprocess.Popen[bytes]
    job = 0
    if sys.platform == "win32":
        environment = {**os.environ, **secrets, "OPENSSL_WIN32_UTF8": "1"}  # else it reads its arguments as ANSI
        argv, flags = [os.path.abspath(argv[0]), *argv[1:]], subprocess.CREATE_NO_WINDOW
        process = subprocess.Popen(argv, env=environment, creationflags=flags, **streams)
        # No lock can be inherited. Instead, what is in the job ends when this process does.
        job = _kernel32.CreateJobObjectW(None, None)
        limits = ctypes.create_string_buffer(144 if sys.maxsize > 1 << 32 else 112)
        limits[17] = b"\x20"  # JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
        _kernel32.SetInformationJobObject(job, 9, limits, len(limits))
        _kernel32.AssignProcessToJobObject(job, int(process._handle))  # type: ignore[attr-defined]
    else:
        added = {**os.environ, **secrets} if secrets else None
        process = subprocess.Popen(argv, env=added, pass_fds=keep, start_new_session=True, **streams)
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    return Child(process, process.stdout, job)


def _readable(pipe: IO[bytes], seconds: float) -> bool:
    """Wait until there is something to read from a pipe, or its end is reached. False when the time has passed."""
    if sys.platform == "win32":
        handle, waiting = msvcrt.get_osfhandle(pipe.fileno()), ctypes.c_ulong()
        deadline = time.monotonic() + seconds
        while _kernel32.PeekNamedPipe(handle, None, 0, None, ctypes.byref(waiting), None) and not waiting.value:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        return True
    poller = select.poll()
    poller.register(pipe, select.POLLIN | select.POLLHUP)
    return bool(poller.poll(seconds * 1000))


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code, None while it runs. Popen.poll() says 0 where the status is lost, and 0 would be a yes."""
    if sys.platform == "win32":
        return process.poll()
    if process.returncode is None:
        try:
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            process.returncode = os.waitstatus_to_exitcode(status) if pid else None
        except ChildProcessError:
            process.returncode = LOST
    return process.returncode


def _kill(child: Child) -> None:
    """End what still runs of it."""
    if sys.platform == "win32":
        _kernel32.CloseHandle(child.job)
        child.process.kill()
    elif child.process.returncode is None:
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()


# --- The command line: the same code paths as under acme2certifier -------------------------------------------

USAGE = """\
examples:
  cmp_ca_handler.py convert -- openssl cmp -cmd ir -server 10.0.0.1:8080 ...
  cmp_ca_handler.py convert < command.txt
  cmp_ca_handler.py --config acme_srv.cfg check --connect
  cmp_ca_handler.py --config acme_srv.cfg enroll www.csr -o www.pem
  cmp_ca_handler.py poll 3f0c77d1a9e25d0b61c8f2b7d4e09a16
  cmp_ca_handler.py revoke www.pem --reason superseded
  cmp_ca_handler.py cacerts -o issuers.pem

exit codes: 0 done, 1 failed, 2 wrong usage, 3 the CA has not decided yet
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. Results go to standard output, all else to standard error."""
    import argparse  # here, so that acme2certifier loads this file fast

    parser = argparse.ArgumentParser("cmp_ca_handler.py", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description, parser.epilog = "Try and check a [CAhandler] section.", USAGE
    parser.add_argument(
        "--config", metavar="FILE", help="acme_srv.cfg; default: $ACME_SRV_CONFIGFILE, or acme2certifier's"
    )
    parser.add_argument("--section", metavar="NAME", default="CAhandler", help="such as CAhandler:internal")
    common = argparse.ArgumentParser(add_help=False)  # `-v` may stand before the command and behind it
    for target, default in ((parser, False), (common, argparse.SUPPRESS)):
        target.add_argument("-v", "--verbose", action="store_true", default=default, help="show openssl's messages")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = functools.partial(commands.add_parser, parents=[common])
    check = add("check", help="report every error in the configuration, and what would be run")
    check.add_argument("--connect", action="store_true", help="also ask the CMP server, and see whether to believe it")
    enroll = add("enroll", help="get a certificate for a CSR file, PEM or DER")
    enroll.add_argument("csr", metavar="CSR")
    poll = add("poll", help="go on with an enrolment that waits for the CA")
    poll.add_argument("identifier", metavar="ID")
    cacerts = add("cacerts", help="ask the CA for its certificates, for cmp_untrusted")
    for command in (enroll, poll, cacerts):
        command.add_argument("-o", "--output", metavar="FILE", help="write the PEM there, not to standard output")
    revoke = add("revoke", help="revoke a certificate, PEM or DER")
    revoke.add_argument("certificate", metavar="CERT")
    revoke.add_argument("--reason", default="unspecified", help="one of " + ", ".join(REASONS))
    convert = commands.add_parser("convert", help="turn an openssl cmp command line into a [CAhandler] section")
    convert.add_argument("words", nargs="*", metavar="-- openssl cmp ...")
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know less than a file may hold
    try:
        code = _convert(args.words or _typed_words()) if args.command == "convert" else _handler_command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough: nothing is left to say, and Python is not to try at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
    except Exception as err:
        known = isinstance(err, (CMPError, OSError))  # the text of another one might hold a secret
        text = str(err) if known else f"internal error: {type(err).__name__}"
        print(f"error: {_one_line(text, 4 * MAX_TEXT)}", file=sys.stderr)
    return 1


def _handler_command(args: Any) -> int:
    """Run check, enroll, poll, revoke or cacerts with the handler that the configuration describes."""
    logger = logging.getLogger("cmp_ca_handler")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.DEBUG if args.verbose else logging.CRITICAL)
    logger.propagate = False
    here = os.path.dirname(os.path.abspath(__file__))
    if os.path.basename(here) == "acme_srv":  # copied into an old release: its helper lies beside this file
        sys.path.append(os.path.dirname(here))
    path = _find_configuration(args.config, here)
    with CAhandler(False, logger) as handler:
        if not handler.config_error:
            handler.use_section(args.section)
        if args.command == "check":
            return _check_command(handler, path or ", ".join(_opened), args)
        if args.command == "revoke":
            code, message, detail = handler.revoke(_argument_file(args.certificate), args.reason)
            return _result(None if code == 200 else f"{message}: {detail}", "revoked\n", None, None)
        argument = _argument_file(args.csr) if args.command == "enroll" else ""
        with _output_file(args.output) as output:  # before the CA is asked: what it has issued must not get lost
            if args.command == "cacerts":
                return _result(None, _ca_certificates(handler._checked(handler._configured())), None, output)
            if args.command == "enroll":
                error, bundle, _, identifier = handler.enroll(argument)
            else:
                handler.ask_always = True
                error, bundle, _, identifier, _ = handler.poll("", args.identifier, "")
            return _result(error, bundle, identifier, output)


_opened: list[str] = []  # what acme2certifier's helper has taken for the configuration


def _find_configuration(named: str | None, here: str) -> str:
    """Say which file is the configuration, the nearest one. Empty where acme2certifier is to look for its own."""
    places = ("acme_srv.cfg", os.path.join("acme_srv", "acme_srv.cfg"), os.path.join(here, "acme_srv.cfg"))
    found = named or os.environ.get("ACME_SRV_CONFIGFILE") or next(filter(os.path.exists, places), "")
    if found:
        with open(found, "rb"):  # or else its helper takes it for an empty one
            os.environ["ACME_SRV_CONFIGFILE"] = found
        return os.path.abspath(found)

    def note(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and re.search(r"acme_srv\.(cfg|ya?ml)$", str(details[0])) and os.path.exists(details[0]):
            _opened[:] = [os.path.abspath(details[0])]

    sys.addaudithook(note)  # each of its releases looks in other places
    return ""


@contextmanager
def _output_file(path: str | None) -> Iterator[IO[bytes] | None]:
    """The file for a bundle, opened without touching what it holds; one that stays empty is not left behind."""
    if not path:
        yield None
        return
    new = not os.path.lexists(path)
    try:
        with open(path, "ab", buffering=0) as file:
            yield file
    finally:
        if new and os.path.isfile(path) and not os.path.getsize(path):
            os.remove(path)


def _argument_file(path: str) -> str:
    """A CSR or certificate from a PEM or DER file, as acme2certifier would hand it over."""
    with open(path, "rb") as file:
        data = file.read(2 * MAX_DER)
    if data[:1] == b"\x30":
        return base64.b64encode(data).decode()
    return data[max(data.find(b"-----BEGIN"), 0) :].decode("latin-1")  # without what `openssl req -text` puts before it


def _result(error: str | None, text: str | None, identifier: str | None, output: IO[bytes] | None) -> int:
    """Print how it ended and give the exit code."""
    if error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not text:
        print(identifier)
        print(f"the CA has not decided yet; go on with: poll {identifier}", file=sys.stderr)
        return 3
    if output:
        try:
            regular = os.path.isfile(output.name)
            if regular:
                output.truncate(0)
            if output.write(text.encode()) == len(text):
                return 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as err:  # the CA has issued: it must not get lost
            print(f"error: {output.name}: {err.strerror}; the bundle is on standard output", file=sys.stderr)
            if regular:
                output.truncate(0)
            sys.stdout.write(text)
            return 1
    sys.stdout.write(text)
    return 0


def _check_command(handler: CAhandler, path: str, args: Any) -> int:
    """Print what the configuration amounts to, and everything that is wrong with it."""
    import shlex

    print(f"file      {_one_line(path, 200) or 'none'}")
    if handler.config_error:  # then there is no section, and all that could be said of it would be untrue
        print(f"error: {handler.config_error}")
        return 1
    settings = _settings(handler.section)
    known = settings.binary.options
    print(_masked(f"openssl   {settings.binary.path or 'not usable'}  {settings.binary.version}", settings).rstrip())
    if known:
        able = {"all extensions of a CSR": settings.binary.converts_csr()}
        able.update({"waiting enrolments": "rspin" in known, "profiles": "profile" in known})
        print("          " + ", ".join(f"{what}: {'yes' if can else 'no'}" for what, can in able.items()))
    print(_masked(f"tmp_dir   {_one_line(settings.directory, 200)}\n", settings))
    for key, value in handler.section.items():
        print(f"  {_one_line(key) + ':':<24} {_shown(key, value, settings)}")
    print()
    findings = [
        Finding(WARNING, text) for text in (*settings.warnings, *_check_acme2certifier(handler, settings, args.section))
    ]
    findings += [Finding(FAULT, text) for text in settings.errors]
    if known and not settings.errors:
        findings += [*_check_pair(settings, ""), *_check_pair(settings, "tls_")]
        findings += _check_server(settings) if args.connect else []
    for level, text in findings:
        print(_masked(f"{level}: {text}", settings))
    if any(level == FAULT for level, _ in findings):
        return 1
    print("an enrolment runs, beside the files of its transaction:")
    words = [shlex.quote(_masked(_one_line(word), settings)) for word in _command(settings, [])]
    print("  " + re.sub(r" (?=-)", " \\\\\n      ", " ".join(words)))
    print("no errors found")
    return 0


HIDDEN = "(hidden)"


def _masked(text: str, settings: Settings) -> str:
    """`text` without what is, or looks like, a secret: the PIN of a token, the password of a proxy."""
    text = _hide(text, settings.hidden)
    text = re.sub(r"(?i)\b((?:(?:user)?[-_]?pin|pass(?:word|phrase)?|secret)[=:])[^;&?\s'\"]+", rf"\1{HIDDEN}", text)
    return re.sub(r"(//)[^/@\s'\"]+@", rf"\1{HIDDEN}@", text)


def _shown(key: str, value: str, settings: Settings) -> str:
    """The value of a key, unless it is a secret: a misspelt key of one has a secret for its value, too."""
    option, known = _key(key)[4:], settings.binary.options
    known_key = option in known.keys() | OUR_KEYS if known else not _looks_secret(option)
    secret = option in SECRET_KEYS or "pass" in option or not known_key or not key.startswith("cmp_")
    if option.endswith("_variable"):  # of its name, unless it is the secret itself, by mistake
        secret = value not in os.environ
    if secret and value:
        return HIDDEN
    if option in ("server", "proxy") and "@" in value:
        value = f"{HIDDEN}@{value.rpartition('@')[2]}"
    return _masked(_one_line(value, 200), settings)


def _check_acme2certifier(handler: CAhandler, settings: Settings, section: str) -> Iterator[str]:
    """Warn of what acme2certifier itself is configured to do, beside our section."""

    def find(key: str, *sections: str) -> str:
        found = [handler._config[name] for name in sections if name in handler._config]
        return next((str(values[key]) for values in found if key in values), "")

    total = settings.seconds("total_timeout") or NO_TIMEOUT
    limit = find("enrollment_timeout", "Certificate")
    if not limit or (limit.strip().isdigit() and int(limit) <= total):
        what = f"enrollment_timeout is {limit}" if limit else "enrollment_timeout is not set, which means 5"
        yield f"[Certificate] {what}: acme2certifier stops waiting too early; set it to {total + 5}"
    if find("challenge_validation_disable", "Challenge").lower() in ("true", "yes", "on", "1"):
        yield "[Challenge] challenge_validation_disable is on: every ACME client gets every name"
    for key in ("handler_module", "handler_file"):
        module = find(key, section, "CAhandler")
        if module and not _is_this_file(module):
            yield f"{key}: {_one_line(module, 100)} is not this file, which is {os.path.realpath(__file__)}"


def _is_this_file(module: str) -> bool:
    """Whether acme2certifier, told to load `module`, loads this file, or one that is the same."""
    if "/" not in module and not module.endswith(".py"):  # a name to import
        return module.rpartition(".")[2] == os.path.basename(__file__).partition(".")[0]
    try:
        with open(module, "rb") as theirs, open(__file__, "rb") as ours:
            return theirs.read(1 << 20) == ours.read(1 << 20)
    except OSError:
        return False


def _check_pair(settings: Settings, kind: str) -> Iterator[Finding]:
    """Look at cmp_cert and cmp_key, or cmp_tls_cert and cmp_tls_key: are they a pair, and what for?"""
    certificate, key = settings.options.get(kind + "cert"), settings.options.get(kind + "key")
    if not certificate or not os.path.isfile(certificate):
        return  # none configured, or one in a token, which only openssl can open
    source = settings.options.get(kind + "keypass")
    password = ["-passin", source] if source else []  # of a PKCS #12 file
    x509 = [settings.binary.path, "x509", "-in", certificate, "-noout", *password]
    about = _run([*x509, "-subject", "-enddate", "-ext", "keyUsage,extendedKeyUsage"], secrets=settings.secrets)
    public = _run([*x509, "-pubkey"], secrets=settings.secrets)
    if about.code != 0 or public.code != 0:
        what = f"{certificate} holds no certificate, or cmp_{kind}keypass does not open it"
        yield Finding(FAULT, f"cmp_{kind}cert: {what}")
        return
    lines = [_one_line(line) for line in about.output.splitlines() if NO_EXTENSIONS not in line]
    print(f"cmp_{kind}cert  {'; '.join(lines)}")
    yield from _check_usage(f"cmp_{kind}cert: {certificate}", about.output, "secret" in settings.options and not kind)
    if not key or not os.path.isfile(key):
        return
    private = _run([settings.binary.path, "pkey", "-in", key, "-pubout", *password], secrets=settings.secrets)
    if private.code != 0:
        yield Finding(FAULT, f"cmp_{kind}key: {key} cannot be opened: check the file and cmp_{kind}keypass")
    elif PUBLIC_KEY.findall(private.output) != PUBLIC_KEY.findall(public.output):  # there may be warnings, too
        yield Finding(FAULT, f"cmp_{kind}key: {key} does not belong to {certificate}")


def _check_usage(name: str, about: str, idle: bool) -> Iterator[Finding]:
    """Judge what a certificate of ours may be used for; it is `idle` where a secret protects the messages."""
    usage = KEY_USES.search(about)
    if usage and not FOR_SIGNATURES.search(usage.group(1)) and not idle:
        what = "lacks the key usage digitalSignature: the CA may refuse what is signed with its key"
        yield Finding(WARNING, f"{name} {what}")
    extended = EXTENDED_KEY_USES.search(about)
    if extended and name.startswith("cmp_tls_") and not FOR_CLIENTS.search(extended.group(1)):
        what = f"is for {extended.group(1).strip()}, not for clients: the TLS server may refuse it"
        yield Finding(WARNING, f"{name} {what}")


# Of PKIFailureInfo (RFC 4210, 5.2.3), what says that the CA does not take us for who we are.
CREDENTIALS_REFUSED = {"badMessageCheck", "wrongIntegrity", "signerNotTrusted"}


def _unreachable(settings: Settings) -> str:
    """Why nobody takes a connection where openssl connects to, at once. Empty where that is for openssl to say."""
    import socket
    from urllib.parse import urlsplit

    options = settings.options
    server, proxy = options.get("server") or "", options.get("proxy") or ""
    excepted = options.get("no_proxy") or os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    if not server or (proxy and excepted) or (_proxies() and not proxy):
        return ""
    key, target = ("cmp_proxy", proxy) if proxy else ("cmp_server", server)
    try:
        address = urlsplit(target if "://" in target else "http://" + target)
        tls = not proxy and (address.scheme == "https" or settings.tls)
        where = (address.hostname or "", address.port or (443 if tls else 80))
        socket.create_connection(where, settings.seconds("msg_timeout") or MSG_TIMEOUT).close()
    except (OSError, ValueError) as err:
        return f"{key}: {_one_line(target, 100)} does not answer: {getattr(err, 'strerror', None) or err}"
    return ""


def _check_server(settings: Settings) -> list[Finding]:
    """Ask the CMP server with a general message (RFC 4210, 5.3.19), through the very options of an enrolment.

    What is proven is proven by the message that openssl has accepted; its text only says what is wrong.
    """
    import tempfile

    fault = _unreachable(settings)
    if fault:
        return [Finding(FAULT, fault)]
    command = _command(settings.without_enrolment("genm"), [])
    with tempfile.TemporaryDirectory() as directory:
        saved = _openssl_path(directory) + "/answer.der"
        command += ["-rspout", saved] if "rspout" in settings.binary.options else []
        run = _run(command, settings.limit(), settings.secrets)
        answer = _response(saved)
    words = answer.printed() if answer else []
    messages = _messages(run.output, settings.hidden, words)
    run = run._replace(words=words, messages=[m for m in messages if not NO_ANSWER_TO_GENM.match(m.text)])
    contact = next((found.group(1) for m in messages if (found := WILL_CONTACT.match(m.text))), settings.server)
    print(_masked(f"connect   {_one_line(contact, 200)}", settings))
    authentic = run.code == 0 or (answer is not None and answer.protected and run.only(AFTER_ACCEPTANCE))
    proven = {"address": bool(answer) or not any(map(CONNECT_TIMEOUT.match, run.errors()))}
    # Who is on the way can add lines to openssl's text, but cannot take away the one that says that TLS has failed.
    tls = bool(run.errors()) and not any(map(TLS_FAILED.search, run.errors()))
    proven.update({"TLS": bool(answer) or tls, "path": bool(answer), "trust": authentic})
    # A CA may sign its no for anybody. Only those who have the secret can make a MAC with it.
    proven["credentials"] = authentic and (run.code == 0 or bool(answer and answer.mac))
    if not settings.tls:
        del proven["TLS"]
    print("          proven: " + ", ".join(f"{what}: {'yes' if yes else 'no'}" for what, yes in proven.items()))
    if run.code == 0:
        return []
    text = _failure_text(run, answer, settings)
    if not authentic:
        return [Finding(FAULT, text)]
    if answer and CREDENTIALS_REFUSED & {*answer.failures}:
        return [Finding(FAULT, f"the CA does not accept the credentials: {text}")]
    return [
        Finding(
            WARNING,
            f"the CA answers, authentically, that it wants no general message; an enrolment may still work: {text}",
        )
    ]


CA_CERTS = "1.3.6.1.5.5.7.4.17"  # id-it-caCerts


def _ca_certificates(settings: Settings) -> str:
    """Ask for the CA's certificates (RFC 9480, 2.14): PEM. Raises CMPError where it sends none."""
    import tempfile

    known, none = settings.binary.options, f"CMP server {settings.server} sends no certificates: ask the CA's operator"
    if not known.keys() >= {"infotype", "rspout", "cacertsout"}:
        raise CMPError(f"{settings.binary.version} cannot ask for CA certificates, OpenSSL 3.0 can")
    command = _command(settings.without_enrolment("genm"), ["-infotype", "caCerts"])
    with tempfile.TemporaryDirectory() as directory:
        # Read out of the saved answer: the file is empty with 3.0, and later ones insist on it.
        path = _openssl_path(directory) + "/answer.der"
        command += ["-rspout", path, "-cacertsout", _openssl_path(directory) + "/cacerts.pem"]
        run = _run(command, settings.limit(), settings.secrets)
        run = run._replace(messages=_messages(run.output, settings.hidden))
        if run.code != 0:
            lacking = any(map(NO_CA_CERTS.search, run.errors()))
            raise CMPError(none if lacking else _failure_text(run, None, settings))
        with open(path, "rb") as file:
            body = _sequence(file.read(MAX_DER))[1]
    found: list[Certificate] = []
    for information in _sequence(body.value):
        kind, *values = _sequence(information.raw)
        if _oid(kind.value) == CA_CERTS and values:
            found += [_certificate(element.raw) for element in _sequence(values[0].raw)]
    if not found:
        raise CMPError(none)
    for certificate in found:
        print(f"{_name_text(certificate.subject)}, valid until {certificate.not_after}", file=sys.stderr)
    return "".join(_pem(certificate.der) for certificate in found)


def _typed_words() -> list[str]:
    """The words of a command line on standard input."""
    import shlex

    text = re.sub(r"[\\^`]\s*\n", " ", sys.stdin.read())  # continuation lines of sh, cmd.exe and PowerShell
    text = text.replace("\\", "\\\\") if os.sep == "\\" else text  # in a path, and no quote
    try:
        return shlex.split(text.lstrip("$# \t"))
    except ValueError as err:
        raise CMPError(f"not a command line: {err}") from err


OUR_VALUES = (("cmd", "ir"), ("popo", "0"), ("config", ""))


def _convert(words: list[str]) -> int:
    """Print the `[CAhandler]` section for an `openssl cmp` command line, and what is wrong with that."""
    if "cmp" not in words:
        raise CMPError("that is no `openssl cmp` command line")
    position = words.index("cmp")
    program, rest = words[position - 1] if position else "openssl", words[position + 1 :]
    options = _known_options(program)
    found, ours, errors = {}, [], []
    while rest:
        option, equals, value = rest.pop(0).lstrip("-").partition("=")
        option = _option_name(option, options)
        takes_value = bool(equals) or options.get(option, bool(rest) and rest[0][:1] != "-")
        if takes_value and not equals:
            value = rest.pop(0) if rest else ""
        if options and option not in options:
            errors.append(f"openssl has no option -{option}{_did_you_mean(option, options, '-')}")
        elif option in FORBIDDEN_KEYS:
            errors.append(f"-{option} is not for enrolling at a CA")
        elif option in RUNTIME_KEYS or option == "subject" or (option, value) in OUR_VALUES:
            ours.append(f"-{option}")
        elif value or not takes_value:  # an empty value is none
            found[option] = _comma_dn(value) if option in DN_KEYS else value or "True"
    print("[CAhandler]\n# handler_module: cmp_ca_handler")
    if ours:
        print(f"# set by the handler itself: {' '.join(ours)}")
    print(f"cmp_openssl_bin: {program}")
    print("# cmp_tmp_dir: a directory that lasts, for enrolments that wait for the CA")
    order = dict.fromkeys([*"server path cert key ref secret trusted".split(), *found])
    for option in filter(found.get, order):
        value = found[option]
        if option in SECRET_KEYS and value.partition(":")[0] not in ("env", "file", "fd"):
            better = "cmp_secret_variable: NAME" if option == "secret" else f"cmp_{option}: env:NAME"
            print(f"# the secret stands in this file; better {better}, with the secret in that variable")
        print(f"cmp_{option}: {value}")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


def _known_options(program: str) -> dict[str, bool]:
    """The options of the program in a command line, of the openssl here if it is on another machine, or nothing."""
    for name in (program, "openssl"):
        try:
            return _binary(name).options
        except (CMPError, OSError):
            continue  # then the form of the command line has to do
    return {}


def _comma_dn(value: str) -> str:
    """`/C=DE/CN=x` as `C=DE, CN=x`: the reverse of `_slash_dn`."""
    if not value.startswith("/"):
        return value
    text = ""
    for part in _split_slash(value):
        escaped = re.sub(r"^[ #]| $|\s(?=[#;]\s)|[,+\"\\\\;<>=]", r"\\\g<0>", part.value)
        text += {"+": "+", "/": ", "}[part.separator] + f"{part.type}={escaped}"
    return text[2:]


if __name__ == "__main__":
    sys.exit(main())
