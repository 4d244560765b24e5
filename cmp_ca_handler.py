#!/usr/bin/env python3
"""CA handler for acme2certifier that talks CMP to any certificate authority.

    ACME client --ACME--> acme2certifier --enroll(csr)--> this file --runs--> openssl cmp --CMP--> CA
                                         <-(error, bundle, cert, poll id)-            <- certificate, chain

acme2certifier loads `CAhandler` from this file. An entry `cmp_X: value` of its `[CAhandler]` section becomes `-X value`
of an `openssl cmp` command line, unless `X` is an option of our own. OpenSSL does all of the CMP (RFC 4210, 9480, 9483,
9810) and all of the cryptography; this file decides what to send, keeps secrets out of sight, and makes errors
readable. It needs nothing but the standard library. For the command line: `python3 cmp_ca_handler.py --help`.

Read it before you trust it with the credentials of a CA, from top to bottom. Nine parts follow, each with its types
and its entry first; a function stands below the first one that calls it, save for some that read DER. Nothing calls
the last part.

    question                                                 where to look
    What becomes of an order?                                CAhandler.enroll
    What does a poll do?                                     CAhandler.poll, Exchange
    What may a profile of an account set?                    CAhandler._profiled_section, OPTIONS
    Which CSRs are refused?                                  _read_csr
    Who proves possession of the key?                        _prove_possession, _check_key
    What is sent?                                            _request, _command
    Which file is whose? What if a poller is killed?         Transaction
    What does the CA's answer mean, and who says so?         Exchange
    Which chain is served?                                   ChainFinder
    What is compared with the CSR?                           _changes
    What does a revocation answer, a second one too?         CAhandler._revoke
    Which options are there, and how is one added?           OPTIONS
    Who says that the configuration is right?                VALUE_FAULTS, COMBINATIONS, _findings, _dry_run
    Where could a secret come out?                           the comment above _secret
    How does openssl run, and when is it ended?              _run, Exchange.silent
    What are openssl's words, and the hints?                 the comment "openssl's words", HINTS

SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):  # noqa: UP036 - 3.8 would fail with a TypeError
    raise ImportError(f"cmp_ca_handler needs Python 3.9 or later, this is {sys.version.split()[0]}")

import base64
import contextlib
import errno
import functools
import importlib
import io
import json
import logging
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import time
import traceback
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import IO, Any, Callable, NamedTuple, Optional

if sys.platform == "win32":  # mypy takes this very test for what it is
    import ctypes
    import msvcrt

    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
else:
    import fcntl

__all__ = ["CAhandler"]
__version__ = "1.1.0"

# What kind of failure it is, for the log and for the exit code of the command line.
CONFIGURATION, REQUEST, REFUSED = "configuration", "request", "refused"
UNAUTHENTIC, UNREACHABLE, DISK, BUSY, INTERNAL = "unauthentic", "unreachable", "disk", "busy", "internal"


class CMPError(Exception):
    """What went wrong, on one line, in words for the administrator."""

    def __init__(self, text: str, kind: str = CONFIGURATION) -> None:
        super().__init__(text)
        self.kind = kind


# --- The handler --------------------------------------------------------------------------------------------

Enrolled = tuple[Optional[str], Optional[str], Optional[str], Optional[str]]
Polled = tuple[Optional[str], Optional[str], Optional[str], Optional[str], bool]
Revoked = tuple[int, Optional[str], Optional[str]]
ACME_ERROR = "urn:ietf:params:acme:error:"
# RFC 5280, 5.3.1, in the order of their numbers; 7 is not used.
REASONS = dict(
    zip(
        "unspecified keyCompromise cACompromise affiliationChanged superseded cessationOfOperation certificateHold"
        " removeFromCRL privilegeWithdrawn aACompromise".split(),
        (0, 1, 2, 3, 4, 5, 6, 8, 9, 10),
    )
)
_warned: set[str] = set()


class Outcome(NamedTuple):
    """How an exchange ended: with the `leaf`, or waiting, or it failed; `final`: asking again is of no use."""

    leaf: Certificate | None = None
    waiting: bool = False
    text: str = ""
    final: bool = False
    kind: str = REFUSED
    bundle: str = ""


class CAhandler:
    """What acme2certifier calls, made anew for each call. A failure is a log line and an error value, no exception."""

    profile_mapping_field = "cmp_profile"

    def __init__(self, debug: bool | None = None, logger: logging.Logger | None = None) -> None:
        self.logger = logger or logging.getLogger("cmp_ca_handler")
        self.cahandler_registry_name: str | None = None  # set by acme2certifier where it has several CAs
        self.section: dict[str, str] = {}
        self.config_error = ""
        self.failure = ""  # the kind of the last one: for the command line
        self.ask_always = False  # poll() asks the CA even before its checkAfter has passed: for the command line
        self._helper: types.ModuleType | None = None
        self._config: Any = {}

    def __enter__(self) -> CAhandler:
        """Read the configuration. Starts no process, leaves nothing on disk: each GET of the directory does this."""
        try:
            self._helper = _acme2certifier_helper()
            self._config = _load_config(self._helper, self.logger)
            self.section = _our_entries(self._config["CAhandler"])
        except Exception as err:
            self.config_error = self._failure("configuration", err)
        return self

    def __exit__(self, *args: object) -> None:
        """Nothing is open between calls."""

    def enroll(self, csr: str) -> Enrolled:
        """Get a certificate for a CSR (base64url DER, or PEM).

        Returns (error, PEM bundle with the leaf first, leaf's DER in base64, None); or (None, None, None, identifier)
        where the CA has not decided yet.
        """
        about: dict[str, object] = {}
        try:
            section = self._profiled_section(csr)
            settings = self._checked(section)
            wanted = _read_csr(csr, settings.san_types)
            about.update(subject=_wanted(wanted), server=settings.server)
            self._check_seen(wanted)
            with closing(_begin(settings, "enrolling", self.logger)) as transaction:
                transaction.save_profile({k: v for k, v in section.items() if self.section.get(k) != v})
                try:
                    outcome = self._obtain(wanted, transaction)
                except BaseException as err:
                    # If our own code fails, the CA's answers are kept: it may have issued. The order waits.
                    transaction.keep = transaction.answered()
                    if not transaction.keep:
                        raise
                    if not isinstance(err, Exception):
                        found = _pairs({"id": transaction.identifier, **about})
                        self.logger.warning("interrupted; for an hour a poll can go on with it: %s", found)
                        raise
                    outcome = Outcome(waiting=True, text=self._failure("enrolment", err, about))
                about["transaction"] = transaction.cmp_id or "unknown"
                if outcome.leaf:
                    return (None, outcome.bundle, base64.b64encode(outcome.leaf.der).decode(), None)
                if not outcome.waiting:
                    raise CMPError(outcome.text, outcome.kind)
                transaction.wait()
                about["reason"] = outcome.text or "the CA has not decided"
                self.logger.info("CMP enrolment waits: %s", _pairs({"id": transaction.identifier, **about}))
                return (None, None, None, transaction.identifier)
        except Exception as err:
            return (self._failure("enrolment", err, about), None, None, None)

    def poll(self, cert_name: str, poll_identifier: str, csr: str) -> Polled:
        """Go on with an enrolment that the CA had not decided.

        Returns (error, bundle, certificate, identifier, rejected). `rejected` is final: the CA's no, or a certificate
        that is not taken. A CA that cannot be reached is an error, and the next poll tries again.
        """
        about: dict[str, object] = {}
        try:
            if not isinstance(poll_identifier, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", poll_identifier):
                raise CMPError("not a transaction identifier", REQUEST)  # it becomes a part of paths
            about["id"] = poll_identifier
            settings = self._waiting_settings()
            kept = _kept_result(settings, poll_identifier)
            if kept:
                outcome = Outcome(kept[0], bundle="".join(_pem(certificate.der) for certificate in kept))
                if csr and not _same_key(_read_csr(csr).key, kept[0].key):
                    raise CMPError("the poll identifier belongs to another CSR", REQUEST)
            else:
                with closing(_resume(settings, poll_identifier, self.logger)) as transaction:
                    outcome = self._poll(csr, transaction, about)
                    transaction.keep = not outcome.bundle and not outcome.final
            certificate = base64.b64encode(outcome.leaf.der).decode() if outcome.leaf else None
            return (outcome.text or None, outcome.bundle or None, certificate, poll_identifier, outcome.final)
        except BlockingIOError:
            self.failure = BUSY
            self.logger.info("CMP poll is in progress elsewhere: %s", _pairs(about))
            return (None, None, None, poll_identifier, False)
        except Exception as err:
            return (self._failure("poll", err, about), None, None, poll_identifier, False)

    def _poll(self, csr: str, transaction: Transaction, about: dict[str, object]) -> Outcome:
        """Ask the CA about a transaction that waits, if it is time. Raises CMPError where that is impossible."""
        wanted = _read_csr(transaction.read("csr.pem"))  # with names of any kind: enroll() has judged them
        about.update(subject=_wanted(wanted), server=transaction.settings.server)
        if csr and _decode(csr, CSR_LABEL) != wanted.der:
            raise CMPError("the poll identifier belongs to another CSR", REQUEST)
        answers = transaction.usable()
        if not answers:  # without them, openssl would begin a second transaction
            raise CMPError(f"{transaction.path} holds no answer that can be used: order the certificate again", DISK)
        about["transaction"] = answers[-1].transaction
        due = _due(answers)
        if due and not self.ask_always:
            self.logger.debug("CMP poll is not due: %s", _pairs({**about, "next": _iso(due)}))
            return Outcome(waiting=True)
        saved = transaction.saved_profile(self._profile_entries())
        transaction.settings = self._checked({**self.section, **saved})
        if "rspin" not in transaction.settings.binary.options:  # its request would use up the nonce
            raise CMPError(f"{transaction.settings.binary.version} cannot go on with an order: use OpenSSL 3.0")
        outcome = self._obtain(wanted, transaction)
        if outcome.text:
            self._failure("poll", CMPError(outcome.text, outcome.kind), about)
        return outcome

    def revoke(self, cert: str, rev_reason: str | None = None, rev_date: str | None = None) -> Revoked:
        """Revoke a certificate (base64url DER, or PEM) for a reason of RFC 5280, 5.3.1, by name or number.

        Returns (200, None, None) or (HTTP status, ACME error type, detail). CMP dates a revocation itself.
        """
        status, problem = 400, "badRevocationReason"
        try:
            code = str(rev_reason).strip() if rev_reason is not None else "unspecified"
            name = next((name for name, number in REASONS.items() if code in (name, str(number))), None)
            if name is None:
                what = f"unknown revocation reason {_one_line(code, 40)}"
                raise CMPError(f"{what}: 0 to 6, 8 to 10, or a name of RFC 5280", REQUEST)
            problem = "malformed"
            try:
                certificate = _certificate(_decode(cert, "CERTIFICATE"))
            except CMPError as err:
                raise CMPError(f"not a certificate: {err}", REQUEST) from err
            status, problem = 500, "serverInternal"
            return self._revoke(certificate, name, self._checked(self._profiled_section(cert, revocation=True)))
        except Exception as err:
            return (status, ACME_ERROR + problem, self._failure("revocation", err))

    def _revoke(self, certificate: Certificate, reason: str, settings: Settings) -> Revoked:
        """Ask the CA to revoke, with the server and the credentials of `settings`."""
        settings = settings.without_enrolment("rr")
        issuer = _hide(_name_text(certificate.issuer), settings.hidden)
        about = {"serial": certificate.serial, "issuer": issuer, "server": settings.server}
        with closing(_begin(settings, "revoking", self.logger)) as transaction:
            transaction.write("old.pem", _pem(certificate.der))
            arguments = ["-revreason", str(REASONS[reason])]
            arguments += _saving(transaction, range(1, MAX_REQUESTS)) if "rspout" in settings.binary.options else []
            run = _openssl_cmp(transaction, ["-oldcert", transaction.file("old.pem"), *arguments])
            if not transaction.answers() and any(map(INVALID_CERTIFICATE.search, run.errors())):  # nothing was sent
                run = _openssl_cmp(transaction, [*_by_serial(certificate, settings), *arguments])
            newest = next(reversed(transaction.answers()), None)
        _log_messages(self.logger, run, settings)
        # The CA's text may have line breaks, and look like an error of openssl's.
        if run.code == 0 and (newest.status in GOOD if newest and newest.body == RP else not run.errors()):
            self.logger.info("certificate revoked: %s", _pairs({**about, "reason": reason}))
            return (200, None, None)
        detail, kind = _failure_text(run, newest, settings)
        self._failure("revocation", CMPError(detail, kind), about)
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
            faults = [self.config_error] if self.config_error else _dry_run(_settings(self.section)).errors
            return _one_line("; ".join(faults), 4 * MAX_TEXT) or None
        except Exception as err:
            return self._failure("check", err)

    def _obtain(self, csr: CSR, transaction: Transaction) -> Outcome:
        """Begin or resume the exchange; where that gets a certificate: the bundle, and the log line about it."""
        _prove_possession(csr, transaction)
        outcome = Exchange(_request(csr, transaction), transaction).outcome()
        if outcome.leaf is None:
            return outcome
        leaf, settings, hidden = outcome.leaf, transaction.settings, transaction.settings.hidden
        about: dict[str, object] = {"subject": _hide(_name_text(leaf.subject), hidden), "serial": leaf.serial}
        changes = _changes(csr, leaf, "" if csr.subject else transaction.read("subject"))
        if changes:
            transaction.warn("the CA issued something else than the CSR asked for: %s: %s", _pairs(about), changes)
            if settings.refuse_changes:
                return Outcome(text=self._take_back(leaf, _hide(changes, hidden), settings), final=True)
        if _common_names(csr.subject) and not csr.names and not leaf.extensions.keys() & {SUBJECT_ALT_NAME, UNREADABLE}:
            text = "the CA issued no subjectAltName, and most clients look at nothing else: %s: ask its operator"
            transaction.warn(text, _pairs(about))
        chain = _chain(leaf, transaction)
        bundle = "".join(_pem(certificate.der) for certificate in chain)
        if transaction.state == "waiting":
            transaction.finish(bundle)
        seconds = f"{time.monotonic() - transaction.started:.2f}"
        about.update(issuer=_hide(_name_text(leaf.issuer), hidden), notAfter=leaf.not_after, chain=len(chain))
        about.update(transaction=transaction.cmp_id or "unknown", server=settings.server, seconds=seconds)
        self.logger.info("certificate issued: %s", _pairs(about))
        return outcome._replace(bundle=bundle)

    def _take_back(self, leaf: Certificate, changes: str, settings: Settings) -> str:
        """Revoke a certificate that nobody has asked for; the text for the error."""
        try:
            _, error, detail = self._revoke(leaf, "cessationOfOperation", settings)
            detail = None if error == ACME_ERROR + "alreadyRevoked" else detail  # by a poll that was killed
        except (CMPError, OSError) as err:
            detail = self._failure("revocation", err)
        end = f"and could not be revoked ({detail}): revoke serial {leaf.serial} at the CA" if detail else "and revoked"
        return f"the CA issued something else than the CSR asked for ({changes}): refused {end}"

    def _check_seen(self, csr: CSR) -> None:
        """Ask acme2certifier how many names it reads in the CSR: it has checked no others. Raises CMPError."""
        read = getattr(self._helper, "csr_san_get", None)
        names = sum(kind in CHECKED_KINDS for kind, _ in csr.names)
        try:
            seen = len(read(self.logger, base64.urlsafe_b64encode(csr.der).decode().rstrip("="))) if read else names
        except Exception as err:
            raise CMPError(f"acme2certifier cannot read this CSR: {_one_line(str(err))}", REQUEST) from err
        if seen != names:
            what = f"acme2certifier reads {seen} of the CSR's {names} subjectAltNames: the others are not checked"
            raise CMPError(what, REQUEST)

    def _profile_entries(self) -> list[str]:
        """The entries that a profile may set: those that the configuration uses, without the fixed ones."""
        entries = dict.fromkeys([*self.section, "cmp_profile"])
        return [entry for entry in entries if not _option(_option_name(entry[4:])).fixed]

    def _waiting_settings(self) -> Settings:
        """The settings for orders that wait; only one fault counts: in a foreign directory anybody may put orders."""
        if self.config_error:
            raise CMPError(self.config_error)
        settings = _settings(self.section)
        if settings.directory_fault:
            raise CMPError(settings.directory_fault)
        return settings

    def _profiled_section(self, argument: str, revocation: bool = False) -> dict[str, str]:
        """The section, with what the profile of the order, of its account or of its HTTP header sets."""
        check, entries = getattr(self._helper, "eab_profile_header_info_check", None), self._profile_entries()
        if check is None or self.config_error:
            return self.section

        def load(function: str, default: Any) -> Any:
            reader = getattr(self._helper, function, None)  # old releases have not got them all
            return reader(self.logger, self._config) if reader else default

        # acme2certifier sets attributes by `hasattr` and `setattr`: let it find only what a profile may set.
        chosen = types.SimpleNamespace(**{entry: self.section.get(entry) for entry in entries})
        chosen.cahandler_registry_name = self.cahandler_registry_name
        chosen.eab_profiling, chosen.eab_handler = load("config_eab_profile_load", (False, None))
        # For a list in a profile it looks at these, at a revocation, too.
        chosen.header_info_field = load("config_headerinfo_load", None)
        chosen.profiles = load("config_profile_load", {})
        error, check_revocation = None, getattr(self._helper, "eab_profile_revocation_check", None)
        try:
            if not revocation:
                error = check(self.logger, chosen, argument, self.profile_mapping_field)
            elif check_revocation and chosen.eab_profiling and chosen.eab_handler:
                check_revocation(self.logger, chosen, argument)
        except Exception as err:  # it stumbles over an empty list, a number, a header without "="
            what = f"acme2certifier cannot apply the profile of this account or order ({type(err).__name__})"
            raise CMPError(f"{what}: look at the file that [EABhandler] names, and at [Order]") from err
        if error:
            raise CMPError(_one_line(str(error)), REQUEST)
        found = {entry: getattr(chosen, entry, None) for entry in entries}
        return {**self.section, **{k: str(v) for k, v in found.items() if isinstance(v, (str, int, float))}}

    def _checked(self, section: Mapping[str, str]) -> Settings:
        """The settings. Raises CMPError, before anything is sent, with every error found."""
        if self.config_error:
            raise CMPError(self.config_error)
        settings = _settings(section)
        for warning in [text for text in settings.warnings if text not in _warned]:  # once per process is enough
            self.logger.warning("configuration: %s", warning)
        _warned.update(settings.warnings)
        if settings.errors:
            raise CMPError("configuration error: " + "; ".join(settings.errors))
        return settings

    def _failure(self, what: str, err: Exception, about: Mapping[str, object] = types.MappingProxyType({})) -> str:
        """Log a failure and give its text."""
        self.failure, text = _explained(err)
        self.logger.error("CMP %s failed: %s", what, _pairs({"class": self.failure, **about, "error": text}))
        return text


def _explained(err: Exception) -> tuple[str, str]:
    """Of which kind a failure is, and what to say about it."""
    if isinstance(err, CMPError):
        return err.kind, _one_line(str(err), 4 * MAX_TEXT)
    if isinstance(err, OSError):
        text = f"{err.strerror or err}: {err.filename}" if err.filename else str(err.strerror or err)
        name = errno.errorcode.get(err.errno or 0, "")  # the system may speak any language
        return DISK, _one_line(text, 4 * MAX_TEXT) + _hint(name)
    lines = [str(f.lineno) for f in traceback.extract_tb(err.__traceback__) if f.filename == __file__]
    # Its text is not shown: nobody knows what is in it, and it may be a secret.
    return INTERNAL, f"internal error: {type(err).__name__} (lines {', '.join(lines)}): please report it"


def _pairs(values: Mapping[str, object]) -> str:
    """`key=value` for the log; a value that is more than one word stands in quotes, written as in JSON."""
    words = {key: str(value) for key, value in values.items()}
    quoted = {k: json.dumps(w, ensure_ascii=False) for k, w in words.items() if not re.fullmatch(r"[\w.:/@*+-]+", w)}
    return " ".join(f"{key}={word}" for key, word in {**words, **quoted}.items())


def _by_serial(certificate: Certificate, settings: Settings) -> list[str]:
    """The options that name a certificate to revoke which openssl itself calls invalid. Raises CMPError."""
    issuer = _slash_form(certificate.issuer, exact=True)
    if "serial" not in settings.binary.options or issuer is None:
        what = f"OpenSSL calls the certificate invalid, and {settings.binary.version} cannot revoke it"
        raise CMPError(f"{what} by issuer and serial: revoke serial {certificate.serial} at the CA", REQUEST)
    return ["-issuer", issuer, "-serial", f"0x{certificate.serial}"]


# acme2certifier, old or new, or none

HELPERS = ("acme2certifier.acme_srv.helper", "acme_srv.helper")  # since 0.45; up to 0.44


def _acme2certifier_helper() -> types.ModuleType | None:
    """acme2certifier's helper module: the one that runs this process, else one that can be imported, else None."""
    # import_module waits where another thread is still importing it; sys.modules would have half of it.
    for name in sorted(HELPERS, key=lambda name: name not in sys.modules):
        with contextlib.suppress(ImportError):  # not this release
            return importlib.import_module(name)
    return None  # the configuration file is read below


def _load_config(helper: types.ModuleType | None, logger: logging.Logger) -> Any:
    """acme2certifier's configuration, a configparser object. Raises CMPError with what is wrong with the file."""
    path = os.environ.get("ACME_SRV_CONFIGFILE") or ""
    if helper is None and not path:
        raise CMPError("no configuration: ACME_SRV_CONFIGFILE is not set, and acme2certifier is not installed")
    try:  # acme2certifier reads YAML too, and overlays the `[CAhandler:<name>]` section where there are several CAs
        config = helper.load_config(logger, "CAhandler") if helper else _read_ini(path)
    except Exception as err:
        what = _one_line(_unreadable(err))
        raise CMPError(f"cannot read {path or 'the configuration of acme2certifier'}: {what}") from None
    if "CAhandler" not in config:
        raise CMPError(f"{_one_line(path) or 'the configuration'} has no [CAhandler] section")
    return config


def _read_ini(path: str) -> Any:
    """An INI file, as acme2certifier reads it."""
    import configparser  # only without acme2certifier

    config = configparser.ConfigParser(interpolation=None)
    config.optionxform = str  # type: ignore[assignment,method-assign]  # keep the case
    with open(path, encoding="utf-8-sig") as file:
        config.read_file(file)
    return config


def _unreadable(err: BaseException) -> str:
    """What is wrong with a configuration file; of its lines no more than a key, for the rest may be a secret."""
    import configparser

    if isinstance(err.__context__, configparser.Error):  # acme2certifier tries YAML where it is no INI
        err = err.__context__
    if isinstance(err, configparser.MissingSectionHeaderError):
        return f"no [section] before line {err.lineno}"
    if isinstance(err, configparser.ParsingError):
        return f"no key and value in line {', '.join(str(number) for number, _ in err.errors)}"
    if isinstance(err, (OSError, UnicodeDecodeError, configparser.Error)):
        return f"{err}; save it in UTF-8" if isinstance(err, UnicodeDecodeError) else str(err)
    mark, what = getattr(err, "problem_mark", None), getattr(err, "problem", None) or str(err)
    if not what.startswith("found duplicate key"):
        what = re.sub("(?s)['\"].*['\"]", "'...'", what)
    return f"line {mark.line + 1}: {what}" if mark else what


def _our_entries(section: Mapping[str, Any]) -> dict[str, str]:
    """What of a section is ours, a misspelt `CMP_` or `cmp-` included: nobody else would say that it is ignored."""
    entries = {key: str(value) for key, value in section.items() if key[:3].lower() == "cmp"}
    for key, value in entries.items():  # of one that has swallowed another, or its own value, no value is shown
        name, *rest = key.split()
        if rest:
            raise CMPError(f"{_one_line(name, 60)}: a colon is missing behind it")
        inner = re.search(r"\s(cmp_\w+)\s*[:=]", value)
        if inner:
            raise CMPError(f"{name}: {inner.group(1)} needs a line of its own, without a blank before it")
    return entries


# --- The request --------------------------------------------------------------------------------------------

# acme2certifier has checked the names that it read in the CSR. openssl reads the CSR again, and the CA what openssl
# sends: every extension, byte for byte. So there must be one list of extensions, each once and in DER, and in it the
# very names that acme2certifier sees (`CAhandler._check_seen`). Refused is what others may misread, and what makes an
# authority; the rest (an emailAddress, an extended key usage) is for the CA's profile to judge.

COMMON_NAME, SUBJECT_ALT_NAME, KEY_USAGE, BASIC_CONSTRAINTS = "2.5.4.3", "2.5.29.17", "2.5.29.15", "2.5.29.19"
EXTENDED_KEY_USAGE, OCSP_SIGNING = "2.5.29.37", "1.3.6.1.5.5.7.3.9"
TN_AUTH_LIST = "1.3.6.1.5.5.7.1.26"  # RFC 8226
EXTENSION_REQUESTS = ("1.2.840.113549.1.9.14", "1.3.6.1.4.1.311.2.1.14")  # PKCS #9 and Microsoft's
RSASSA_PSS, EC_KEY = "1.2.840.113549.1.1.10", "1.2.840.10045.2.1"
ED25519, ED448, ML_DSA = "1.3.101.112", "1.3.101.113", re.compile(r"2\.16\.840\.1\.101\.3\.4\.3\.1[789]")
# Those of NIST, SEC and Brainpool over prime fields, and SM2: all without points of small order.
CURVES = re.compile(
    r"1\.2\.840\.10045\.3\.1\.[1-7]|1\.3\.132\.0\.([89]|10|3[0-5])"
    r"|1\.3\.36\.3\.3\.2\.8\.1\.1\.\d+|1\.2\.156\.10197\.1\.301"
)
P25519 = 2**255 - 19
ORDER_8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
SMALL_ORDER = (0, 1, P25519 - 1, P25519, P25519 + 1, ORDER_8, P25519 - ORDER_8)  # y of the points that sign anything
RSA_KEYS = ("1.2.840.113549.1.1.1", "2.5.8.1.1", RSASSA_PSS)
# The extensions that everybody reads; those of other arcs are the CA's alone to understand.
STANDARD_ARCS = ("2.5.29.", "1.3.6.1.5.5.7.")
# Extensions that tell of the CA, or name somebody.
OF_THE_CA = {
    "2.5.29.16": "privateKeyUsagePeriod",
    "2.5.29.18": "issuerAltName",
    "2.5.29.30": "nameConstraints",
    "2.5.29.36": "policyConstraints",
    "2.5.29.46": "freshestCRL",
    "2.5.29.54": "inhibitAnyPolicy",
    "1.3.6.1.5.5.7.1.11": "subjectInfoAccess",
    "1.3.6.1.4.1.311.25.2": "Active Directory SID",
    "1.3.6.1.4.1.11129.2.4.2": "certificate timestamps",
    "1.3.6.1.4.1.11129.2.4.3": "precertificate poison",
    "1.3.36.8.3.3": "admissions",
}
# GeneralName (RFC 5280, 4.2.1.6): tag -> kind.
SAN_KINDS = {0x81: "email", 0x82: "DNS", 0x86: "URI", 0x87: "IP", 0x88: "RID", 0xA0: "otherName", 0xA4: "dirName"}
TEXT_KINDS = frozenset(("DNS", "URI", "email"))
CHECKED_KINDS = frozenset(("DNS", "IP", "email"))  # those that acme2certifier compares with the order
CRITICAL_NAMES = b"\x06\x03\x55\x1d\x11\x01\x01\xff"  # the beginning of a critical subjectAltName
CSR_LABEL = "(?:NEW )?CERTIFICATE REQUEST"


class CSR(NamedTuple):
    """What a PKCS #10 request (RFC 2986) asks for."""

    der: bytes
    subject: Name
    key: bytes  # the subjectPublicKeyInfo
    extensions: dict[str, bytes]
    names: list[tuple[str, str]]  # the subjectAltNames: kind and text

    def lonely(self) -> set[str]:
        """CNs of hosts and addresses without any other name: acme2certifier has compared them with the order."""
        texts = () if self.extensions.keys() & {SUBJECT_ALT_NAME, TN_AUTH_LIST} else _cn_texts(self.subject)
        # To openssl, `critical` is no name, what else has a colon names a kind, and 010.0.0.1 is an address.
        return {t for t in texts if _address(t) or re.fullmatch(r"(?!critical$|[\d.]+$)[\w.*-]+", t, re.A)}


def _read_csr(argument: object, kinds: Collection[str] = tuple(SAN_KINDS.values())) -> CSR:
    """Read a CSR, with names of these `kinds`. Raises CMPError where it is none, or where others may misread it."""
    try:
        der = _decode(argument, CSR_LABEL)
        _check_der(der)
        information, _, _ = _sequence(der)
        version, subject, key, *attributes = _members(information)
        if version.raw != b"\x02\x01\0" or [a.tag for a in attributes] not in ([], [0xA0]):
            raise CMPError("it is not a PKCS #10 request of version 1: update the ACME client (certbot before 2.0)")
        _check_key(key)
        extensions = _requested(attributes[0].value if attributes else b"")
        _check_extensions(extensions, kinds)
        name = _name(subject.raw)
        name = name if any(a.raw for rdn in name for a in rdn) else []  # an empty CN names nobody
        csr = CSR(der, name, key.raw, extensions, _alternative_names(extensions))
        _check_common_name(csr)
        return csr
    except (CMPError, IndexError, ValueError) as err:
        what = err if isinstance(err, CMPError) else "it is not a PKCS #10 request"
        raise CMPError(f"not a usable CSR: {what}", REQUEST) from err


def _check_key(key: Element) -> None:
    """Refuse a key with which anybody can sign: then the CSR's signature proves no possession of the private key."""
    algorithm, bits = _members(key)
    kind, *parameters = _members(algorithm)
    oid, tags = _oid(kind.value), [parameter.tag for parameter in parameters]
    if tags not in ([], [0x05], [0x06]) and oid != RSASSA_PSS:
        # With a generator of one's own choice the private key of any public point is known (CVE-2020-0601).
        raise CMPError("its key has explicit parameters, so its signature proves nothing: use RSA or a named curve")
    if tags == [0x06] and oid == EC_KEY and not CURVES.fullmatch(_oid(parameters[0].value)):
        raise CMPError("its elliptic curve has points with which anybody can sign, or is unknown: use P-256")
    small = oid == ED25519 and int.from_bytes(bits.value[1:], "little") % (1 << 255) in SMALL_ORDER
    # A point at infinity, or the like. In Ed448 the last bit is a sign; in ML-DSA the first 32 octets are a seed.
    start, end = 33 if ML_DSA.fullmatch(oid) else 2, -1 if oid == ED448 else None
    if small or not any(bits.value[start:end]):
        raise CMPError("its key is one with which anybody can sign, so its signature proves nothing: make a new one")
    if oid in RSA_KEYS:
        exponent = int.from_bytes(_sequence(bits.value[1:])[1].value, "big", signed=True)
        if exponent < 3 or exponent % 2 == 0:  # with 1 the signature is the message
            raise CMPError("its RSA key has an exponent below 3, or an even one, so its signature proves nothing")


def _requested(attributes: bytes) -> dict[str, bytes]:
    """The extensions of the one extension request (RFC 2985, 5.4.2): of two, one reader would take the first."""
    parsed = [_members(attribute) for attribute in _elements(attributes)]
    requests = [values for kind, values in parsed if _oid(kind.value) in EXTENSION_REQUESTS]
    if len(requests) > 1:
        raise CMPError(f"it has {len(requests)} extension requests: only one is allowed")
    extensions: dict[str, bytes] = {}
    for values in requests:
        content = list(_elements(values.value))
        if values.tag != 0x31 or [element.tag for element in content] not in ([], [0x30]):
            raise CMPError("its extension request is not exactly one list of extensions")
        for extension in _elements(content[0].value if content else b""):
            identifier, *critical, value = _members(extension)
            oid = _oid(identifier.value)
            # FALSE is the default of `critical`, which DER does not write down.
            if (identifier.tag, value.tag) != (0x06, 0x04) or [c.raw for c in critical] not in ([], [b"\x01\x01\xff"]):
                raise CMPError(f"its extension {oid} is not DER: an identifier, TRUE (FF) if critical, and a value")
            if oid in extensions:
                raise CMPError(f"it has the extension {oid} twice")
            extensions[oid] = value.value
    return extensions


def _check_extensions(extensions: Mapping[str, bytes], kinds: Collection[str]) -> None:
    """Refuse what others may misread, and what is not for a client to ask for; names only of these `kinds`."""
    for oid, value in extensions.items():
        if oid in OF_THE_CA:
            raise CMPError(f"it asks for the extension {OF_THE_CA[oid]}, which is for the CA to decide")
        if oid.startswith(STANDARD_ARCS):
            try:
                _check_der(value)
            except CMPError as err:
                raise CMPError(f"its extension {oid} is malformed: {err}") from err
    if _signs_certificates(extensions):
        raise CMPError("it asks for a CA certificate (basicConstraints or keyUsage), which no ACME client needs")
    if OCSP_SIGNING in [_oid(usage.value) for usage in _sequence(extensions.get(EXTENDED_KEY_USAGE, b"\x30\x00"))]:
        raise CMPError("it asks for the extended key usage OCSPSigning, with which it could undo the CA's revocations")
    if SUBJECT_ALT_NAME in extensions and not _sequence(extensions[SUBJECT_ALT_NAME]):
        raise CMPError("its subjectAltName is malformed: it has no names")
    for name in _sequence(extensions.get(SUBJECT_ALT_NAME, b"\x30\x00")):
        kind, text = SAN_KINDS.get(name.tag, f"[{name.tag & 0x1F}]"), _one_line(ascii(name.value)[2:-1], 80)
        if kind not in kinds:
            allowed = ", ".join(kinds)
            raise CMPError(f"its subjectAltName {kind} '{text}' is not a type that cmp_san_types allows: {allowed}")
        visible = re.fullmatch(rb"[!-~]+", name.value) if kind in TEXT_KINDS else name.value
        if not visible or (kind == "IP" and len(name.value) not in (4, 16)) or (kind == "RID" and not _oid(name.value)):
            raise CMPError(f"its subjectAltName {kind} '{text}' is malformed")


def _signs_certificates(extensions: Mapping[str, bytes]) -> bool:
    """Whether it is a CA's: TRUE in basicConstraints, or keyCertSign in keyUsage (RFC 5280, 4.2.1.9 and 4.2.1.3)."""
    usage, *second = _elements(extensions.get(KEY_USAGE, b"\x03\x01\0"))
    if second or usage.tag != 0x03 or not 1 <= len(usage.value) <= 3:  # in pieces, others may read something else
        raise CMPError("its keyUsage is malformed")
    constraints = _sequence(extensions.get(BASIC_CONSTRAINTS, b"\x30\0"))
    signs = any(bits & 0x04 for bits in usage.value[1:2])
    return signs or any(element.tag == 0x01 and any(element.value) for element in constraints)


def _check_common_name(csr: CSR) -> None:
    """acme2certifier compares the first CN with the order, old releases only where there is no subjectAltName.

    So it must be the only one, be read alike by everybody, and be among the subjectAltNames if it looks like a host.
    """
    names = [attribute for rdn in csr.subject for attribute in rdn if attribute.type == COMMON_NAME]
    if len(names) > 1:
        raise CMPError(f"its subject has {len(names)} common names (CN): only one is allowed")
    for name in names:  # TeletexString is Latin-1 for some, UTF-8 for others
        if name.text is None or "\0" in name.text or (name.tag == 0x14 and not name.raw.isascii()):
            raise CMPError("its common name (CN) is no string that everybody reads alike: use UTF8String")
    checked = {_spelled(name) for kind, name in csr.names if kind in CHECKED_KINDS}
    hosts = _common_names(csr.subject)
    if TN_AUTH_LIST in csr.extensions and (hosts or SUBJECT_ALT_NAME in csr.extensions):
        raise CMPError("it asks for telephone numbers (TNAuthList) and names: acme2certifier checks only one of them")
    for host in sorted(hosts - checked) if SUBJECT_ALT_NAME in csr.extensions else ():
        what = f"its common name (CN) {_one_line(host, 80)} is not among its subjectAltNames"
        raise CMPError(f"{what}: nobody has checked it")


def _common_names(subject: Name) -> set[str]:
    """The CNs that can be mistaken for a host's name or address, as subjectAltNames would have it."""
    dots = "[\u2024\u3002\ufe52\uff0e\uff61]"  # these are dots, too (RFC 3490, 3.1; NFKC)
    texts = {re.sub(dots, ".", text).rstrip(".") for text in _cn_texts(subject)}
    return {text for text in texts if re.fullmatch(r"[^\s.@]+(\.[^\s.@]+)+|[0-9a-f]*:[0-9a-f:.]+", text)}


def _cn_texts(subject: Name) -> set[str]:
    """The CNs, as `_spelled` has them."""
    return {_spelled((a.text or "").strip()) for rdn in subject for a in rdn if a.type == COMMON_NAME}


def _spelled(name: str) -> str:
    """A name to compare with others: in small letters, without a dot at its end, an address in its shortest form."""
    return _address(name) or name.lower().rstrip(".")


def _address(name: str) -> str:
    """An IP address in its shortest form; an empty string where it is none."""
    if not re.fullmatch(r"[\d.]+|[0-9A-Fa-f]*:[0-9A-Fa-f:.]+", name, re.A):
        return ""
    import ipaddress  # not every CSR has one

    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return ""


def _alternative_names(extensions: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """The subjectAltNames (RFC 5280, 4.2.1.6) as (kind, text); what is no text is in hexadecimal."""
    names = []
    for name in _sequence(extensions.get(SUBJECT_ALT_NAME, b"\x30\x00")):
        kind, text = SAN_KINDS.get(name.tag, f"[{name.tag & 0x1F}]"), name.value.hex()
        if kind in TEXT_KINDS:
            text = name.value.decode("ascii", "backslashreplace")
        elif kind == "IP" and len(name.value) in (4, 16):
            import ipaddress  # not every certificate has one

            text = str(ipaddress.ip_address(name.value))
        names.append((kind, text))
    return names


def _wanted(csr: CSR) -> str:
    """What a CSR asks for, for the log: its subject, or else its names."""
    names = ", ".join(f"{kind}:{name}" for kind, name in csr.names)
    return _name_text(csr.subject) if csr.subject else _one_line(names, 100) or "(no name)"


def _prove_possession(csr: CSR, transaction: Transaction) -> None:
    """Check the CSR's signature and save its public key: `-popo 0` tells the CA that the RA has done so (RFC 4211, 4).

    Neither acme2certifier nor `openssl cmp` does it. `_check_key` has refused keys with which anybody can sign.
    """
    binary, name = transaction.settings.binary, transaction.key_file
    if os.path.exists(transaction.file(name)):
        return  # a poll: it was verified before the CA was asked
    transaction.write("csr.pem", _pem(csr.der, "CERTIFICATE REQUEST"))
    # Without -config, `req` fails where the openssl.cnf that the program was built for is not there.
    run = _run([binary.path, "req", "-config", os.devnull, "-in", transaction.file("csr.pem"), "-verify", "-noout"])
    if run.killed():
        raise CMPError(run.killed(), INTERNAL if run.code == LOST else UNREACHABLE)
    # The exit code of OpenSSL 3.0 is 0 for a bad signature too, so the message decides.
    if SIGNATURE_WRONG.search(run.output):
        raise CMPError("the CSR's signature does not fit its public key: no proof of possession, refused", REQUEST)
    if run.code != 0 or not SIGNATURE_FITS.search(run.output):
        said = _one_line("; ".join(line.text for line in run.lines[:2])) + _hint("cannot use the CSR")
        raise CMPError(f"openssl cannot use the CSR: {said}", REQUEST)
    transaction.write(name, csr.key if name.endswith(".der") else _pem(csr.key, "PUBLIC KEY"))


def _request(csr: CSR, transaction: Transaction) -> list[str]:
    """The options that describe one enrolment."""
    settings, file = transaction.settings, transaction.file
    known, whole = settings.binary.options, settings.binary.since(3, 0)
    arguments = ["-certout", file("cert.pem"), "-extracertsout", file("extracerts.pem")]
    arguments += ["-cacertsout", file("capubs.pem")] if "cacertsout" in known else []
    if settings.options.get("cmd") == "p10cr":  # the request is the CSR
        return [*arguments, "-csr", file("csr.pem")]
    arguments += ["-newkey", file(transaction.key_file)]
    subject = _subject(csr, settings)
    if subject is not None:
        arguments += ["-subject", subject]
        if transaction.state == "enrolling":
            transaction.write("subject", subject)
    if whole and (csr.extensions or subject is None):  # later ones than 3.0 refuse an extension request that is empty
        arguments += ["-csr", file("csr.pem")]
    names = _names_to_add(csr, transaction)
    if names:
        arguments += ["-sans", _utf8(",".join(names))]
    elif "san_nodefault" in known:  # without it the names of the RA's own certificate go into the request
        arguments += [f"-{settings.binary.spelled['san_nodefault']}"]
    # Names are critical exactly where there is no subject (RFC 5280, 4.2.1.6): Java and others insist. If those of the
    # CSR are not so, openssl gets them from a file, byte for byte, unless the administrator has such a file himself.
    critical, options = subject in (None, "/"), settings.options
    free = whole and not options.get("config") and not options.keys() & {"section", "reqexts"}
    if free and csr.names and not csr.subject and critical != (CRITICAL_NAMES in csr.der):
        value = ("critical,DER:" if critical else "DER:") + csr.extensions[SUBJECT_ALT_NAME].hex()
        transaction.write("request.cnf", f"[names]\nsubjectAltName = {value}\n")
        arguments += ["-config", file("request.cnf"), "-reqexts", "names"]
    return arguments


def _subject(csr: CSR, settings: Settings) -> str | None:
    """What to pass as `-subject`; None leaves the subject to `-csr`."""
    if csr.subject:
        whole = settings.binary.since(3, 0)
        text = _slash_form(csr.subject, exact=whole)
        if text is None and not whole:
            version, subject = settings.binary.version, _name_text(csr.subject)
            raise CMPError(f"{version} cannot send the subject {subject}: use OpenSSL 3.0", REQUEST)
        return text
    if "subject" in settings.options:
        return settings.options["subject"]
    # Corporate CAs refuse an empty subject, and certbot's is empty. A longer name than 64 is no CN (RFC 5280, A.1).
    fitting = [name for wanted in ("DNS", "IP") for kind, name in csr.names if kind == wanted and 0 < len(name) <= 64]
    return _slash_form([[Attribute(COMMON_NAME, UTF8, fitting[0], b"")]], exact=True) if fitting else None


def _names_to_add(csr: CSR, transaction: Transaction) -> list[str]:
    """The names for `-sans`: none where `-csr` brings the CSR's own, for the request would have two such extensions."""
    settings = transaction.settings
    if settings.binary.since(3, 0):
        return [] if "reqexts" in settings.options else [*csr.lonely()]  # clients look at subjectAltNames alone
    carried = [(k, name) for k, name in csr.names if k in ("DNS", "URI", "IP") and not re.search(r"[\s,\\]", name)]
    lost = [kind for kind, name in csr.names if (kind, name) not in carried]
    lost += [oid for oid in csr.extensions if oid != SUBJECT_ALT_NAME]
    if lost:
        transaction.logger.warning("openssl before 3.0 leaves out these parts of the CSR: %s", ", ".join(lost))
    return [name for _, name in carried]


# --- A transaction is a directory ---------------------------------------------------------------------------

RESULT_KEPT = 24 * 3600  # seconds for which the result of a poll is kept
SWEPT_AFTER = 3600  # seconds after which the directory of an enrolment that was killed is swept


class Transaction:
    """`<cmp_tmp_dir>/<id>/`, locked while it is in use, and what the work on it needs.

    enrolling, waiting, revoking, asking  one of them: its state, and the lock
    csr.pem, pubkey.der (or .pem) the request: what the client has signed, and its key
    subject, profile              what was sent as -subject; what the order's profile has set
    NNN.der                       the CA's answers; the newest holds the nonce that it expects next
    NNN.new, NNN.req              an answer as openssl saved it, the last of them may be anybody's; its request
    repeated                      a repeated certConf got no answer
    issued (first issued.part)    the result of a poll, kept for a day, when all else is gone
    of one run alone              scratch, cert.pem, extracerts.pem, capubs.pem, request.cnf; of the chain
                                  issuer.pem, below.pem; of a revocation old.pem

    Who sees which file, and why nothing is lost:

    - enroll() makes the directory, holds the lock, and asks. The CA says "waiting". wait() renames `enrolling` to
      `waiting` and syncs all: only now acme2certifier gets the identifier. Killed before that, nobody knows of the
      order, and the sweep of a later one deletes the directory when it is an hour old.
    - A poller takes the lock and has openssl ask. It is killed with -9: the system lets go of the lock, and openssl,
      which holds it too, goes on until its time is up, so no second poller asks in between (on Windows it ends, too).
      What it gets is there as NNN.new. The next poll throws it away if it does not fit its request (`_fits`), or
      replays it: openssl goes on from it, or refuses it (`_judgement`). Without any usable answer it asks nothing.
    - The CA says yes. finish() writes the bundle as `issued`, whole and synced, before the poller says so. Killed then,
      the next poll hands out the same bundle. Killed after it, too; and a day later the sweep deletes it.
    - Two pollers: the second finds the lock taken, and says at once that the order waits. Or it opens the lock file,
      then the first one finishes and lets go, so it gets the lock of a file that is gone: `_resume` looks for it.
    - The sweep sees `enrolling`. The enrolment gets "waiting", renames it and lets go. The sweep gets the lock of a
      file that is now called `waiting`: its old name is gone, so it leaves the directory alone.
    """

    def __init__(self, settings: Settings, identifier: str, state: str, lock: int, logger: logging.Logger) -> None:
        self.settings, self.identifier, self.state, self.logger = settings, identifier, state, logger
        self.lock = lock  # a file descriptor
        self.path = f"{settings.directory}/{identifier}"
        self.keep = state == "waiting"
        self.started = time.monotonic()
        self.cmp_id = ""  # CMP's transactionID, once the CA has answered

    @property
    def key_file(self) -> str:
        """Where the CSR's public key is: OpenSSL 3 reads DER faster; older ones, or with -keyform, only PEM."""
        faster = self.settings.binary.since(3, 0) and "keyform" not in self.settings.options
        return "pubkey.der" if faster else "pubkey.pem"

    def file(self, name: str) -> str:
        """The path of one of its files."""
        return f"{self.path}/{name}"

    def write(self, name: str, data: str | bytes) -> None:
        """Make one of its files."""
        left = data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape")
        with open(self.file(name), "wb", buffering=0) as file:
            while left:  # a full disk takes a part, and fails then
                left = left[file.write(left) :]

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

    def save_profile(self, entries: Mapping[str, str]) -> None:
        """Save what the order's profile has set."""
        if entries:
            self.write("profile", json.dumps(entries))

    def saved_profile(self, allowed: Sequence[str]) -> dict[str, str]:
        """What the order's profile had set when the enrolment began."""
        try:
            profile = json.loads(self.read("profile") or "{}")
            return {key: str(value) for key, value in profile.items() if key in allowed}
        except (ValueError, AttributeError, RecursionError) as err:
            raise CMPError(f"the file {self.file('profile')} is damaged: order the certificate again", DISK) from err

    def saved(self) -> list[str]:
        """The names of the saved answers, in order, whole or not."""
        names = (name for name in os.listdir(self.path) if re.fullmatch(r"\d{3,}\.(der|new)", name))
        return sorted(names, key=lambda name: (len(name), name))  # 1000 comes after 999

    def answers(self, headers: bool = False) -> list[Message]:
        """The saved answers that are whole, in order; or only their headers."""
        found = [message for name in self.saved() if (message := _saved_message(self.file(name), headers))]
        self.cmp_id = found[-1].transaction if found else self.cmp_id
        return found

    def usable(self) -> list[Message]:
        """The answers that openssl can go on from.

        The newest may be somebody's recording, saved while a process was killed: then it does not fit its request.
        """
        found = _usable(self.answers())
        unproven = bool(found) and found[-1].path.endswith(".new")
        return found[:-1] if unproven and not _fits(found) else found

    def answered(self) -> bool:
        """Whether there is an answer to go on from; where none can be read now (no descriptors), any answer."""
        try:
            return bool(self.usable())
        except OSError:
            return any(os.path.exists(self.file(name)) for name in ("001.new", "001.der"))

    def warn(self, text: str, *values: object) -> None:
        """Log a warning that has names of certificates in it: whoever has made them may know the secret."""
        self.logger.warning("%s", _hide(text % values, self.settings.hidden))

    def wait(self) -> None:
        """Let it wait for the CA. That is a promise, so it is on the disk before it is said."""
        self.keep = True
        try:
            os.rename(self.file(self.state), self.file("waiting"))  # possible on a full disk, too
            for path in (*map(self.file, os.listdir(self.path)), self.path, os.path.dirname(self.path)):
                _sync(path)
        except OSError as err:
            what = f"waits, but {self.path} may be lost: a power failure or the sweep can delete it"
            self.logger.error("CMP enrolment %s %s: %s", self.identifier, what, err.strerror)

    def finish(self, bundle: str) -> None:
        """Keep the result: acme2certifier may be killed before it has stored what poll() returned."""
        try:
            self.write("issued.part", bundle)
            _sync(self.file("issued.part"))
            os.replace(self.file("issued.part"), self.file("issued"))
            _sync(self.path)
        except OSError as err:
            self.logger.warning("cannot keep the result of %s for a second poll: %s", self.identifier, err.strerror)

    def close(self) -> None:
        """Let go of the directory, and delete it unless it is to keep.

        First the lock's file: without it nobody can take the transaction up again, so nobody finds half of it.
        """
        try:
            try:
                if not self.keep:
                    os.remove(self.file(self.state))
            finally:
                _unlock(self.lock)  # also where somebody has deleted the directory: or else a descriptor is lost
            if not self.keep:
                _delete(self.path, but="issued")
        except OSError as err:
            what = "unlock %s, whose order stays" if self.keep else "delete %s"
            self.logger.error(f"cannot {what}: %s", self.path, err.strerror)


def _usable(answers: Iterable[Message]) -> list[Message]:
    """The answers as far as openssl can go on from them, if they are replayed to it (-rspin).

    That is: waiting, pollRep.., certificate, and, where the CA takes its time with the confirmation, waiting,
    pollRep.., pkiConf. A CA says "waiting" once. So a second one is a recording that somebody sends, to end the order:
    OpenSSL 3.5 would take it, and ask no more.
    """
    usable: list[Message] = []
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


def _fits(history: Sequence[Message], live: bool = False) -> bool:
    """Whether the newest answer is to its request: by transaction, and nonce of that or (RFC 9483, 4.4) of the first.

    Somebody may send an answer that he has recorded: its protection fits, its nonce does not. A replay cannot show
    that, for openssl then takes transaction and nonces from the answers themselves; nor can the request of a replay
    that was killed: it is younger than an answer that is not `live`, of this run.
    """
    newest, nonces = history[-1], [answer.nonces[1] for answer in history[:-1][:1]]
    asked = _saved_message(newest.path[:-4] + ".req")
    if asked is None or (not live and os.stat(asked.path).st_mtime_ns > os.stat(newest.path).st_mtime_ns):
        return True  # nobody can tell
    return newest.transaction == asked.transaction and newest.nonces[1] in [*nonces, asked.nonces[0]]


def _begin(settings: Settings, state: str, logger: logging.Logger) -> Transaction:
    """A new transaction with a random identifier. Raises CMPError or OSError."""
    _make_directory(settings)
    _sweep(settings, logger)
    identifier = os.urandom(16).hex()
    path = f"{settings.directory}/{identifier}"
    os.mkdir(path, 0o700)
    try:
        return Transaction(settings, identifier, state, _locked(f"{path}/{state}", new=True), logger)
    except OSError:
        _delete(path)
        raise


_swept: dict[str, float] = {}


def _sweep(settings: Settings, logger: logging.Logger) -> None:
    """Delete what killed processes left an hour ago, if nobody holds its lock, and old results; no order that waits."""
    base, now = settings.directory, time.time()
    if abs(now - _swept.get(base, 0)) < SWEPT_AFTER / 6:
        return
    _swept[base] = now
    for name in filter(re.compile("[0-9a-f]{32}").fullmatch, os.listdir(base)):
        path = f"{base}/{name}"
        try:
            there, age = os.listdir(path), now - os.lstat(path).st_mtime
            state = next((state for state in ("waiting", "enrolling", "revoking") if state in there), "")
            if age <= (RESULT_KEPT if "issued" in there else SWEPT_AFTER):
                continue
            if "issued" in there or not state:  # or killed while it asked, or was made or deleted
                _delete(path)
            elif state != "waiting":
                _sweep_killed(settings, name, state, logger)
        except (CMPError, OSError) as err:
            logger.debug("not swept: %s", _one_line(str(err)))


def _sweep_killed(settings: Settings, name: str, state: str, logger: logging.Logger) -> None:
    """Delete what an enrolment or a revocation left that was killed, and say what may have become of it."""
    with closing(_resume(settings, name, logger, state)) as transaction:
        answers = transaction.answers()
        about = {"directory": transaction.path, "transaction": answers[-1].transaction if answers else "none"}
        what = "the CA may have revoked or not: revoke again"
        if state == "enrolling":
            what = "the CA may have issued a certificate that nobody has: revoke it there"
            with contextlib.suppress(CMPError):  # killed before the CSR was written
                about["subject"] = _wanted(_read_csr(transaction.read("csr.pem")))
        logger.warning("deleted what a killed process left: %s; %s", _pairs(about), what)


def _kept_result(settings: Settings, identifier: str) -> list[Certificate]:
    """The bundle that an earlier poll has got, empty if there is none."""
    path = f"{settings.directory}/{identifier}/issued"
    return [] if os.path.islink(path) else _certificates(path)


def _resume(settings: Settings, identifier: str, logger: logging.Logger, state: str = "waiting") -> Transaction:
    """The transaction of this identifier, locked.

    Raises CMPError where it is unknown, BlockingIOError where somebody works on it.
    """
    base, path = settings.directory, f"{settings.directory}/{identifier}"
    text = f"no transaction {identifier} in {base}: it is finished, or cmp_tmp_dir has changed or was lost"
    # acme2certifier does not know the identifier of an enrolment that was killed, but who finds it may go on with it.
    killed = state == "waiting" and not os.path.exists(f"{path}/waiting")
    try:
        lock = _locked(f"{path}/{'enrolling' if killed else state}")
    except (FileNotFoundError, NotADirectoryError) as err:
        raise CMPError(text, REQUEST) from err
    try:
        if killed:
            os.rename(f"{path}/enrolling", f"{path}/waiting")
        if not os.path.exists(f"{path}/{state}"):  # finished, or renamed, between our open and our lock
            raise CMPError(text, REQUEST)
    except BaseException:
        _unlock(lock)
        raise
    return Transaction(settings, identifier, state, lock, logger)


def _delete(path: str, but: str = "") -> None:
    """Delete a transaction's directory, or all in it `but` one file. Needs one descriptor: there may be no more."""
    names = os.listdir(path)
    try:
        for name in names:
            if name != but:
                os.remove(f"{path}/{name}")
        if but not in names:
            os.rmdir(path)
    except IsADirectoryError:
        shutil.rmtree(path)


# --- The exchange with the CA, and its verdict ----------------------------------------------------------------

POLL_REQUESTS, MAX_REQUESTS = 4, 15  # that a poll, and any run of openssl, may send
NO_MORE_REQUESTS = "no-directory/no-more"  # a file that cannot be written
SHORT_CHECK_AFTER = 5  # seconds of checkAfter that a poll sleeps, rather than have too little time for the answer
OF_THE_MOMENT = ("systemUnavail", "systemFailure")
OF_THE_MESSAGE = ("badMessageCheck", "badDataFormat", "badTime", "badAlg", "wrongIntegrity", "signerNotTrusted")
ACCEPTED, NOT_ACCEPTED, UNKNOWN = "accepted", "not accepted", "unknown"  # by openssl


class Exchange:
    """`openssl cmp` runs for an enrolment, from the start or on from saved answers; and what has come of it.

    Three sources tell that, in this order of trust: the file that openssl writes as its last act; the CA's messages,
    read as DER; openssl's text. Anybody on the way can add to that text, but take nothing away. So a strange line
    proves that openssl did not accept an answer; only where there is none, the others tell something (`Run.only`).

    The course of a poll: `CAhandler.poll` hands out a kept result, or locks the directory (`_resume`). Before the time
    of checkAfter (`_due`) that is all. Then the same request is made again (`_request`), and

    - `_ask`: openssl replays the saved answers (-rspin), asks the CA, and is ended when it only sleeps (`silent`);
    - the certificate is there: `CAhandler._obtain` goes on with it;
    - `_refused`: the CA's no, which openssl has accepted, or a certificate that openssl does not take: the end;
    - `_keep`: which of the new answers are authentic (`_judgement`)? They are saved, the others deleted;
    - `_issued_before`: the certificate of an earlier answer, whose confirmation the CA does not answer;
    - `_undecided`: the order waits.
    """

    def __init__(self, request: Sequence[str], transaction: Transaction) -> None:
        self.request, self.transaction, self.settings = request, transaction, transaction.settings
        self.before = transaction.usable() if transaction.state == "waiting" else []
        self.first = max(map(_number, self.before), default=0) + 1  # of the answers of this run
        self.after: list[Message] = []
        self.run, self.deadline = Run(HUNG, ""), 0.0

    def outcome(self) -> Outcome:
        """Ask the CA, keep what it has said, and tell what has become of the enrolment."""
        _check_room(self.transaction.path)  # or else the answers could not be saved
        if self.before:
            self._clear(self.before)
        self._ask()
        if self.before and self.run.only(TIME_IS_UP) and not self._made(self.first):
            # openssl counts whole seconds, so its time may have run out before it could ask: once more, with more time.
            self._ask(more_seconds=2)
        certificates = _certificates(self.transaction.file("cert.pem"))  # written when all was done
        answers = self.transaction.answers(headers=bool(certificates))  # then they tell the transactionID, for the log
        self.after = [answer for answer in answers if _number(answer) >= self.first]
        outcome = Outcome(certificates[0]) if certificates else self._refused()
        if outcome is None:
            history = self._keep()
            news = bool(self.after) and _number(self.after[-1]) in map(_number, history)
            outcome = (None if news else self._issued_before()) or self._undecided(news, bool(history))
            self._clear(history)
        usual = [END_OF_REPLAY] if self.before else []
        usual += [END_OF_WAIT] if outcome.waiting and not outcome.text else []
        _log_messages(self.transaction.logger, self.run, self.settings, "|".join(usual))
        return outcome

    def _clear(self, answers: Sequence[Message]) -> None:
        """Delete what a run has left: its requests, its certificate, all answers but these."""
        useful = {os.path.basename(answer.path) for answer in answers}
        requests = [name for name in os.listdir(self.transaction.path) if name.endswith(".req")]
        self.transaction.remove("cert.pem", "scratch", *requests, *(set(self.transaction.saved()) - useful))

    def _ask(self, more_seconds: int = 0) -> None:
        """Run openssl, save each request and answer, and end it when it has nothing more to do than to sleep."""
        known, replay = self.settings.binary.options, [answer.path for answer in _needed_again(self.before)]
        overrides = _resumed_timeouts(self.settings, self.before[-1], more_seconds) if self.before else {}
        total = int(overrides.get("total_timeout") or self.settings.seconds("total_timeout") or NO_TIMEOUT)
        # A CA that says checkAfter 0 is asked again and again without a pause. So openssl gets names for so many
        # requests; the next one it cannot write (NO_MORE_REQUESTS), and it ends before it sends that.
        count = POLL_REQUESTS if self.before else min(POLL_REQUESTS + 1 + total, MAX_REQUESTS)
        files = ["-rspin", ",".join(replay)] if replay else []
        files += _saving(self.transaction, range(self.first, self.first + count), replay) if "rspin" in known else []
        patience = max(self.settings.seconds("msg_timeout"), self.settings.binary.margin())
        # A poll is not to sleep. Otherwise there must be time for an answer, and openssl counts whole seconds.
        self.deadline = time.monotonic() + (0 if self.before else total - patience - 1)
        self.run = _openssl_cmp(self.transaction, self.request, files, overrides, self.silent)

    def silent(self) -> bool:
        """While openssl says nothing: keep it from what it has no time for. Whether to end it: it only sleeps."""
        if not os.path.exists(self.transaction.file(f"{self.first:03d}.new")):
            return False  # the usual case, and this is asked often
        newest = _saved_message(self.transaction.file(self.transaction.saved()[-1]))
        if newest is None or not (newest.body == POLLREP or newest.waits()):
            return False
        left, number = self.deadline - time.monotonic(), _number(newest)
        if newest.body == POLLREP and newest.check_after >= 1:
            # It sleeps until checkAfter has passed since the answer came. It writes each request before it sends it. So
            # as long as the one that follows is not there, nothing is on its way, and openssl can be ended.
            age = max(0.0, time.time() - os.stat(newest.path).st_mtime)
            following = self.transaction.file(f"{number + 1:03d}.req")
            return newest.check_after - age > left and not os.path.exists(following)
        if left < 0:  # it does not sleep, but has asked again: let it be unable to write the request after that one
            with contextlib.suppress(OSError):  # it is made already; Windows lets only administrators make a link
                os.symlink(NO_MORE_REQUESTS, self.transaction.file(f"{number + 2:03d}.req"))
        return False

    def _made(self, number: int) -> bool:
        """Whether openssl has made the request for this answer, that is, has accepted the one before."""
        message = _saved_message(self.transaction.file(f"{number:03d}.req"))
        return message is not None and message.body != ERROR

    def _refused(self) -> Outcome | None:
        """The CA has said no, and openssl has accepted that; or openssl does not take the certificate."""
        # certConfirmed comes where a proxy has repeated the certConf: the next poll finds out. At a poll and a certConf
        # some failures tell of the message, which somebody on the way may have changed, and in an error message some
        # tell of a CA that cannot work now, not of the order.
        newest, errors = next(reversed(self.after), None), self.run.errors()
        goes_on = self.before or any(answer.waits() or answer.grants() for answer in self.after)
        passing = OF_THE_MESSAGE + OF_THE_MOMENT if newest and newest.body == ERROR else ()
        no_decision = {"certConfirmed", *(passing if goes_on else ())}
        refused = newest and newest.refuses() and newest.protected and not no_decision & {*newest.failures}
        leaf_refused = any(map(LEAF_NOT_ACCEPTED.match, errors))
        leaf_refused |= bool(newest and newest.grants()) and any(map(NOT_THE_ANSWER.match, errors))
        final = leaf_refused or (refused and not any(answer.grants() for answer in self.before))
        return Outcome(text=self._text()[0], final=True) if final and self.run.only(AFTER_ACCEPTANCE) else None

    def _text(self) -> tuple[str, str]:
        """Why there is no certificate, and of which kind that is."""
        if self.run.code == 0:
            where = f"cmp_tmp_dir {self.settings.directory}"
            return f"openssl saved no whole certificate: is the disk of {where} full?", DISK
        newest = self.after[-1] if self.after else None
        if newest and self._made(_number(newest) + 1):
            newest = None  # openssl has accepted it, and what failed came later
        text, kind = _failure_text(self.run, newest, self.settings)
        granted = next((answer for answer in [*self.before, *self.after[:-1]] if answer.grants()), None)
        if granted and newest and newest.refuses() and kind == REFUSED:
            leaf, hidden = _certificate(granted.certificate), self.settings.hidden
            why = [_foreign(error, hidden) for error in self.run.errors() if not ACCEPTED_LINE.match(error)]
            text = "; ".join([f"the CA has issued serial {leaf.serial}, but refuses its confirmation", *why, text])
        return text, kind

    def _keep(self) -> list[Message]:
        """The authentic answers, which are on the disk now; `_clear` deletes the others.

        openssl saves an answer before it checks it. It goes on only from one that it has accepted, so all are authentic
        but perhaps the newest. That one is thrown away only if openssl has certainly not accepted it: a live answer
        thrown away takes with it the nonce that the CA expects next.
        """
        history = _usable([*self.before, *self.after])
        judgement = self._judgement(history) if history else ACCEPTED
        kept = []
        for answer in history if judgement == ACCEPTED else history[:-1]:
            path = answer.path[:-4] + ".der"
            if answer.path != path:
                _sync(answer.path)
                os.replace(answer.path, path)
            kept.append(answer._replace(path=path))
        if kept:
            _sync(self.transaction.path)  # nothing old is deleted before the new is on the disk
        # While nobody knows about the newest, the pollRep before it is kept, too: if the newest turns out to be false,
        # openssl goes on from that one.
        return [*kept, history[-1]] if judgement == UNKNOWN else _needed_again(kept)

    def _judgement(self, history: Sequence[Message]) -> str:
        """What openssl has made of the newest of these answers. UNKNOWN: nobody can tell now."""
        newest = history[-1]
        if not newest.path.endswith(".new") or self._made(_number(newest) + 1):
            return ACCEPTED  # before this run; or it has made the request that follows
        if newest in self.after and self.run.only(TIME_IS_UP):
            return ACCEPTED
        if newest in self.after and not _fits(history, live=True):
            return NOT_ACCEPTED
        # Also where openssl has hung, for the machine may have been paused; and of what a killed poll has left.
        return self._replayed(history)

    def _replayed(self, history: Sequence[Message]) -> str:
        """What openssl makes of the newest of these answers: it gets them all again, and no server."""
        file, number = self.transaction.file, _number(history[-1])
        replay = [answer.path for answer in _needed_again(history)]
        requests = [*["scratch"] * (len(replay) - 1), f"{number:03d}.req", f"{number + 1:03d}.req"]
        files = ["-rspin", ",".join(replay), "-reqout", ",".join(map(file, requests))]
        null = os.devnull  # the disk may be full, which says nothing about the answer
        files += ["-certout", null, "-extracertsout", null, "-cacertsout", null]
        nowhere = {"server": "127.0.0.1:9", "no_proxy": "127.0.0.1", "msg_timeout": "1"}
        # With so little time openssl gives up on a pollRep at once, and says so. Where it says more, it has to go on.
        for total in [1, 1 + self.settings.binary.margin()] if history[-1].body == POLLREP else [1]:
            self.transaction.remove(*requests)
            overrides = {**nowhere, "total_timeout": str(total)}
            run = _openssl_cmp(self.transaction, self.request, files, overrides, lambda: self._made(number + 1))
            if run.code == 0 or self._made(number + 1) or (self._made(number) and run.only(TAKEN)):
                return ACCEPTED
            if run.code == self.run.code == HUNG:  # twice: some false signers make openssl loop for ever
                return NOT_ACCEPTED
            # Half a request, or none for this answer: the disk is full, which says nothing about the answer.
            half = os.path.exists(file(requests[-1])) and _saved_message(file(requests[-1])) is None
            if half or not run.complete() or not self._made(number):
                return UNKNOWN
        return NOT_ACCEPTED

    def _issued_before(self) -> Outcome | None:
        """The certificate that an earlier run has got, where the CA answers something else, or twice nothing."""
        granted = next((answer for answer in self.before if answer.grants()), None)
        if granted is None or not self.run.complete():
            return None
        # Whether openssl takes this certificate, its certConf says (RFC 4210, 5.3.18).
        requests = [_saved_message(self.transaction.file(f"{n:03d}.req")) for n in range(1, self.first + 1)]
        taken = any(request and request.body == CERTCONF and request.status in GRANTED for request in requests)
        if not taken or not (self.after or self._unanswered_again()):
            return None
        text = self._text()[0]
        self.transaction.logger.warning("the certificate is issued, but its confirmation is not proven: %s", text)
        return Outcome(_certificate(granted.certificate))

    def _unanswered_again(self) -> bool:
        """Note that a repeated certConf got no answer; whether that was so before. A CA that is away does not count."""
        if any(map(CONNECT_TIMEOUT.match, self.run.errors())):
            return False
        before = os.path.exists(self.transaction.file("repeated"))
        self.transaction.write("repeated", "")
        return before

    def _undecided(self, news: bool, answered: bool) -> Outcome:
        """The order waits if the CA has answered; where the newest answer is no news, the text says why."""
        if news and (self.run.code == ASLEEP or self.run.only(TIME_IS_UP)):
            return Outcome(waiting=True)
        text, kind = self._text()
        return Outcome(waiting=answered, text=text, kind=kind)


def _saving(transaction: Transaction, numbers: Iterable[int], replayed: Sequence[str] = ()) -> list[str]:
    """The options with which openssl saves its requests and the answers, and ends where it wants to send more."""
    names = [transaction.file(f"{number:03d}") for number in numbers]
    # It saves the replayed answers again: into `scratch`.
    answers = [*[transaction.file("scratch")] * len(replayed), *(f"{name}.new" for name in names)]
    requests = [f"{name}.req" for name in [*(path[:-4] for path in replayed), *names]]
    return ["-rspout", ",".join(answers), "-reqout", ",".join([*requests, transaction.file(NO_MORE_REQUESTS)])]


def _needed_again(answers: Sequence[Message]) -> list[Message]:
    """Those that are replayed. An older pollRep says nothing more, and openssl would sleep for it."""
    return [*(answer for answer in answers[:-1] if answer.body != POLLREP), *answers[-1:]]


def _number(answer: Message) -> int:
    """The number in the name of its file."""
    return int(os.path.basename(answer.path)[:-4])


def _due(answers: Sequence[Message]) -> float:
    """When the CA may be asked again (checkAfter, RFC 4210, 5.3.22); 0 is now, also where the clock was set back."""
    newest, pause = answers[-1], answers[-1].check_after
    if newest.body != POLLREP or not newest.path.endswith(".der") or not 0 <= pause < 1 << 32:
        return 0  # `_iso` cannot print larger ones
    saved, pause = os.stat(newest.path).st_mtime, max(pause, 1)
    return saved + pause if 0 <= time.time() - saved < pause else 0


def _resumed_timeouts(settings: Settings, newest: Message, more_seconds: int) -> dict[str, str]:
    """The time-outs of a run that goes on from `newest`: room for its sleep and two answers, where the sleep is short.

    On a pollRep openssl sleeps min(checkAfter, -total_timeout less its margin) first. So where checkAfter is long, the
    answers can have the margin and no more, for a poll is not to take longer than some seconds.
    """
    margin, patience = settings.binary.margin(), settings.seconds("msg_timeout") or MSG_TIMEOUT
    pause = max(newest.check_after, 0) if newest.body == POLLREP else 0
    total = margin + more_seconds + (pause + 2 * patience if pause <= SHORT_CHECK_AFTER else 1)
    return {"msg_timeout": str(min(patience, total)), "total_timeout": str(total)}


Overrides = Mapping[str, Optional[str]]  # options for one run, in place of the configured ones


def _openssl_cmp(
    transaction: Transaction,
    request: Sequence[str],
    files: Sequence[str] = (),
    overrides: Overrides = types.MappingProxyType({}),
    asleep: Callable[[], bool] = lambda: False,
) -> Run:
    """One run of `openssl cmp`, logged without the many `files`; errors that it passed over early are notes."""
    settings, command = transaction.settings, _command(transaction.settings, request, overrides)
    if transaction.logger.isEnabledFor(logging.DEBUG):  # no secret is in it: they are in the environment
        transaction.logger.debug("running %s", " ".join(_one_line(word) or "''" for word in command))
    total = int(overrides.get("total_timeout") or settings.seconds("total_timeout"))
    limit = total + GRACE if total else NO_TIMEOUT  # 0 is none
    run = _run([*command, *files], limit, settings.environment, [transaction.lock], asleep)
    # What openssl calls an error before it sends anything, and goes on, is none: say, that its own TLS certificate has
    # another root than the server's. Below the verbosity at which it says "sending", somebody else could say that.
    elsewhere = settings.options.get("config") or "section" in settings.options  # it may be set there
    says = not elsewhere and int(settings.options.get("verbosity") or SAYS_SENDING) >= SAYS_SENDING
    sent = next((number for number, line in enumerate(run.lines) if SENDING.match(line.text)), 0) if says else 0
    early = [x._replace(level=logging.INFO) if x.level == logging.ERROR else x for x in run.lines[:sent]]
    return run._replace(lines=[*early, *run.lines[sent:]])


def _command(
    settings: Settings, arguments: Sequence[str], overrides: Overrides = types.MappingProxyType({})
) -> list[str]:
    """The openssl command line: the configured options in their order, then what belongs to this request."""
    argv = [settings.binary.path, "cmp"]
    p10cr = settings.options.get("cmd") == "p10cr"  # at which openssl would warn of some at each request
    for option, value in {**settings.options, **overrides}.items():
        if option == "subject" or (p10cr and (option == "popo" or "ir" in _option(option).marks)):
            continue  # the subject is decided for each request
        name = settings.binary.spelled.get(option, option)
        argv += [f"-{name}"] if value is None else [f"-{name}", value]
    argv += ["-batch"] if "batch" in settings.binary.options else []  # it asks nobody anything
    return [*argv, *arguments]


def _failure_text(run: Run, newest: Message | None, settings: Settings) -> tuple[str, str]:
    """Why it failed, with a hint, and of which kind that is: in the CA's own words, where openssl accepted these."""
    if newest is not None and (newest.refuses() or newest.body == RP) and run.only(AFTER_ACCEPTANCE):
        return _refusal_text(newest, settings), REFUSED
    if newest and newest.protected and run.only(TIME_IS_UP) and settings.options.get("cmd") in ("rr", "genm"):
        return f"CMP server {settings.server} answered waiting{_hint('PKIStatus: waiting')}", REFUSED
    unverified = f"; an unverified answer says: {newest.words(settings.hidden)}" if newest and newest.refuses() else ""
    if run.killed():
        kind = INTERNAL if run.code == LOST else UNREACHABLE
        return f"{run.killed()} (CMP server {settings.server}){unverified}", kind
    sent = any(SENT.match(line.text) for line in run.lines)  # before that, nobody else can have written a line
    if not newest and not sent and (not run.errors() or any(map(NOT_BEGUN.match, run.errors()))):
        faults, _ = _openssl_faults(settings)
        if faults:
            return f"configuration error: {'; '.join(faults)}", CONFIGURATION
        errors = [line.text for line in run.lines if CAUSE.match(line.text)]
        kind = CONFIGURATION if faults is None else REQUEST  # with another request, all is well
        searched = " ".join(line.text for line in run.lines)  # no server has written anything
    else:
        # What looks like the CA's answer in openssl's text is not, or it would have been accepted.
        errors = [error for error in run.errors() if not unverified or not ACCEPTED_LINE.match(error)]
        kind = UNREACHABLE if newest is None else REFUSED if run.only(AFTER_ACCEPTANCE) else UNAUTHENTIC
        # Ended by us, before it could say that it does not accept this pollRep.
        errors = errors or ["openssl does not accept the answer"] * (run.code == ASLEEP)
        # The text of an answer, and the names of its signer, may have line breaks. They stand behind the first error.
        ours = errors[:1] if kind == UNAUTHENTIC else errors
        searched = " ".join(FOREIGN_WORDS.sub(r"\1", error) for error in ours)
        # What the answer is made of says more than openssl does.
        if newest and not newest.refuses() and NOT_PROTECTED.match(searched):
            searched = "answers are not protected"
        elif newest and newest.mac and NO_MAC.match(searched):
            searched = "another kind of MAC"
        elif newest and not all([newest.transaction, *newest.nonces]) and UNMATCHED.match(searched):
            searched = "the request was not read"
        if NO_SIGNER.match(searched):  # OpenSSL 3.0 says in a warning why it has passed over the one that is there
            searched = " ".join([line.text for line in run.lines if OUT_OF_DATE.fullmatch(line.text)] + [searched])
        elif newest is None and CERTIFICATE_REFUSED.match(searched) and not any(map(OF_THE_SIGNER.match, errors)):
            searched, kind = f"{TLS_REFUSED} {''.join(OUT_OF_DATE.findall(errors[0]))}", UNAUTHENTIC
        # Beside cmp_srvcert it says what failed inside.
        if kind == UNAUTHENTIC and "srvcert" in settings.options and run.errors() and not _hint(searched):
            searched = SRVCERT_REFUSED
    said = _foreign("; ".join(errors[:4]), settings.hidden) or "openssl gave no reason"
    return f"CMP with {settings.server} failed: {said}{unverified}" + _hint(searched), kind


def _refusal_text(answer: Message, settings: Settings) -> str:
    """What the CA has answered in place of a yes."""
    verb = "rejected the request:" if answer.failures or answer.status == REJECTION else "answered"
    failures = " ".join(answer.failures) or f"PKIStatus: {'waiting' if answer.status == WAITING else 'other'}"
    # Where the CA says more than that it does not trust the signer, that is the reason, not the certificate.
    more = {*answer.details} - {*answer.texts} or answer.error_code is not None
    # The failInfo chooses the hint, and of the CA's text these words: it may speak of certificates and secrets, too.
    words = CA_WORDS.findall(" ".join([*answer.texts, *answer.details]))
    hint = "" if failures == "signerNotTrusted" and more else _hint(" ".join([*words, failures]))
    return f"CMP server {settings.server} {verb} {answer.words(settings.hidden)}{hint}"


# --- The certificate: its chain, and what it was asked for ------------------------------------------------------

MAX_CHAIN = 10
MAX_WAYS = 24  # from the leaf upwards: anybody can put more into extraCerts
MAX_LINKS = 24  # processes for the links of one chain


def _chain(leaf: Certificate, transaction: Transaction) -> list[Certificate]:
    """The leaf and its issuers in order, up to the self-signed root, or as far as issuers are known (RFC 8555, 9.1).

    Whatever goes wrong here does not cost the certificate: what is verified is served, and the log says what is not.
    """
    warn = transaction.warn
    try:
        finder = ChainFinder(leaf, transaction)
        chain, anchored, ends = finder.best()
    except (CMPError, OSError) as err:
        warn("cannot look for the chain now: %s", _one_line(str(err)))
        return [leaf]
    why, roots = finder.passed_over(chain[-1]), any(_names_as_issuer(c, c) for c in finder.named)
    if finder.invalid:
        what = "a broken or repeated extension, an empty keyUsage: nobody can verify it, so ask the CA's operator"
        warn("OpenSSL calls the issued certificate itself invalid (%s), and it is served without its issuer", what)
    elif len(chain) == 1 and not ends:
        warn("the issuer's certificate is not there: name it in cmp_untrusted%s", why)
    elif not ends and not anchored and (roots or why):  # else the root is left out on purpose
        top, missing = _name_text(chain[-1].subject), _name_text(chain[-1].issuer)
        warn("the bundle ends with %s, below its root: name its issuer, %s, in cmp_untrusted%s", top, missing, why)
    for certificate in (c for c in chain if not c.valid()):
        name, limits = _name_text(certificate.subject), f"{certificate.not_before} to {certificate.not_after}"
        renewed = "ask the CA's operator" if certificate is leaf else "name its renewed certificate in cmp_untrusted"
        what = "set the clock, here or at the CA" if certificate.not_before > _iso(time.time()) else renewed
        warn("the bundle holds %s, valid only from %s: %s", name, limits, what)
    return chain


# Links that openssl has verified in this process, as hashes, for strangers can send large certificates: of the one
# below (of a leaf perhaps what names its issuer's key: see `ways`), and of the issuer.
_links: set[bytes] = set()


class ChainFinder:
    """Finds the ways from a certificate upwards, and has openssl verify each link, most of them once (see `ways`).

    Nothing is trusted because of where it stands: a certificate from extraCerts, which nothing protects (RFC 4210,
    5.1), is served if openssl says that it has signed the one below, and a way that ends in the configuration, or
    in caPubs, is preferred to it.
    """

    def __init__(self, leaf: Certificate, transaction: Transaction) -> None:
        self.leaf, self.transaction, self.left = leaf, transaction, MAX_LINKS
        self.invalid = False  # openssl calls the leaf itself invalid
        self.false: list[str] = []  # candidates that openssl does not take for the issuer, and why
        found: dict[str, list[Certificate]] = {"untrusted": [], "trusted": [], "out_trusted": []}
        for option, certificates in found.items():
            for path in _file_list(option, transaction.settings.options.get(option) or ""):
                certificates += (there := _configured_certificates(path))
                if not there:
                    what, name = "holds no certificate that can be read: make it PEM", _one_line(path, 100)
                    transaction.warn("cmp_%s: %s %s", option, name, what)
        anchors = found["trusted"] + found["out_trusted"]
        # What the configuration names, and caPubs, which are protected.
        self.named = [*found["untrusted"], *anchors, *_certificates(transaction.file("capubs.pem"))]
        self.sent = _certificates(transaction.file("extracerts.pem"))
        earlier = transaction.answers() if not self.sent or transaction.state == "waiting" else []
        for element in (e for answer in earlier for e in _elements(answer.sent)):  # those of the last message are there
            with contextlib.suppress(CMPError):  # anybody can put one there that openssl reads, and we do not
                self.sent.append(_certificate(element.raw))
        # A renewed certificate of an anchor has its name and key.
        self.anchors, self.protected = set(map(_who, anchors)), set(map(_who, self.named))

    def best(self) -> tuple[list[Certificate], bool, bool]:
        """The chain to serve, whether it ends at a trust anchor, and whether at a self-signed certificate."""
        found: list[tuple[tuple[bool, ...], list[Certificate], bool]] = []
        for number, (way, ends) in enumerate(self.ways([self.leaf]), 1):
            anchored, protected = _who(way[-1]) in self.anchors, _who(way[-1]) in self.protected
            # In this order: else a stranger's cross-certificate would win against an expired configured issuer.
            known = len(way) > 1 or ends  # an issuer that has expired is better than none
            valid = all(c.valid() for c in way[1:])
            rank: tuple[bool, ...] = (protected and (ends or anchored), known, valid, anchored)
            found.append((rank, way, ends))
            if all(rank) or number == MAX_WAYS:
                break
        rank, way, ends = max(found, key=lambda one: one[0])
        return way, rank[-1], ends

    def ways(self, way: list[Certificate]) -> Iterator[tuple[list[Certificate], bool]]:
        """Every way on from the end of `way`, the best one first, and whether it ends at a self-signed one."""
        last, trodden = way[-1], set(map(_who, way))
        # A CA below one of its own name has not signed itself, whatever it is called.
        ends = _names_as_issuer(last, last) and self.signed_by(last, last, last.der)
        named = {c.der: c for c in [*self.named, *self.sent] if _names_as_issuer(last, c)}
        found = [c for c in named.values() if _who(c) not in trodden and not ends and len(way) < MAX_CHAIN]
        # Valid ones first, of these the configured ones, and of these such as last as long as the leaf.
        # Stable: the configuration stays before caPubs, and these before extraCerts.
        found.sort(key=lambda c: (not c.valid(), c not in self.named, c.not_after < self.leaf.not_after))
        # Each leaf is new. If it names its issuer's key, and all candidates have that one key, openssl verifies the
        # link for the first leaf alone: the next leaf of this issuer costs no process.
        sure = len(way) == 1 and last.authority_key and len({c.key for c in found}) == 1
        alike = (last.extensions.get(oid, b"") for oid in (AUTHORITY_KEY_ID, KEY_USAGE, BASIC_CONSTRAINTS))
        mark = last.algorithm + b"".join(alike) if sure and UNREADABLE not in last.extensions else last.der
        for issuer in found:
            if self.signed_by(issuer, last, mark if issuer.subject_key else last.der):
                yield from self.ways([*way, issuer])
        yield way, ends

    def signed_by(self, issuer: Certificate, below: Certificate, mark: bytes) -> bool:
        """Whether openssl says that `issuer` has signed `below`; a yes is remembered as one for `mark`."""
        import hashlib  # acme2certifier has it already

        link = hashlib.sha256(b"%d " % len(mark) + mark + issuer.der).digest()
        foreign = issuer not in self.named and issuer is not self.leaf
        # What anybody can put into extraCerts may not use up what the configured issuers need.
        if link in _links or self.invalid or self.left <= (MAX_LINKS // 3 if foreign else 0):
            return link in _links
        self.left -= 1
        file, program = self.transaction.file, self.transaction.settings.binary.path
        self.transaction.write("issuer.pem", _pem(issuer.der))
        self.transaction.write("below.pem", _pem(below.der))
        argv = [program, "verify", "-partial_chain", "-no_check_time", "-ignore_critical"]
        argv += ["-check_ss_sig"] if below is issuer else []  # else openssl does not verify a trusted root's signature
        run = _run([*argv, "-trusted", file("issuer.pem"), file("below.pem")])
        if run.killed():
            raise CMPError(run.killed())
        if run.code == 0:
            if len(_links) > 1000:
                _links.clear()
            _links.add(link)
        elif below is self.leaf and INVALID_CERTIFICATE.search(run.output):
            purposes = _run([program, "x509", "-in", file("below.pem"), "-noout", "-purpose"])
            self.invalid = INVALID_FOR_ALL_PURPOSES in purposes.output  # else it is the issuer that is invalid
        if run.code != 0 and below is not issuer and not self.invalid:
            why = _one_line((FALSE_SIGNER.findall(run.output) or [run.output])[0], 100)
            self.false.append(f"{_name_text(issuer.subject)} ({why})")
            if foreign:
                self.left -= 3  # anybody may put such a certificate there, and each costs a process
                self.transaction.warn("passed over a certificate in extraCerts: %s", self.false[-1])
        return run.code == 0

    def passed_over(self, below: Certificate) -> str:
        """The end of a warning: what is there of its issuer's name, and why it is not the issuer."""
        named = [c for c in [*self.named, *self.sent] if c.subject_id == below.issuer_id and c != below]
        if self.false:
            return f" (openssl does not take what is there for it: {self.false[-1]})"
        if named and not any(_names_as_issuer(below, c) for c in named):
            keys = f"key identifier is {named[0].subject_key.hex()}, not {below.authority_key.hex()}"
            return f" (the {_name_text(named[0].subject)} that is there has another key: its {_one_line(keys, 120)})"
        return ""


def _who(certificate: Certificate) -> tuple[object, bytes]:
    """Its name and key, which it keeps when it is renewed."""
    return certificate.subject_id, certificate.key


def _certificates(path: str) -> list[Certificate]:
    """The certificates in a PEM or DER file, if there is one; what is none is passed over."""
    if not os.path.isfile(path):
        return []
    with open(path, "rb", buffering=0) as file:
        data = file.read()
    pem = rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----([A-Za-z0-9+/=\s]*)-----END"
    found = []
    for block in re.findall(pem, data) or [data]:
        with contextlib.suppress(*MALFORMED):
            der = block if block is data else base64.b64decode(block)
            found.append(_certificate(next(_elements(der)).raw))  # openssl's trust settings follow in TRUSTED ones
    return found


def _configured_certificates(path: str) -> list[Certificate]:
    """The same for a file that the configuration names: read again only when it has changed."""
    return _unchanged_certificates(path, _file_state(path))


@functools.lru_cache(maxsize=16)
def _unchanged_certificates(path: str, state: tuple[int, ...]) -> list[Certificate]:
    return _certificates(path)


def _names_as_issuer(below: Certificate, issuer: Certificate) -> bool:
    """Whether `below` names `issuer`, as far as it tells (RFC 5280, 4.2.1.1). Who has signed it is another question."""
    same_key = not below.authority_key or issuer.subject_key in (b"", below.authority_key)
    return same_key and issuer.subject_id == below.issuer_id


def _changes(csr: CSR, leaf: Certificate, subject: str) -> str:
    """What the CA has made of a request that nobody has asked for, or an empty string.

    A CA may repeat the common name as a subjectAltName, and the other way round. `subject` is what was sent as
    `-subject`, where the CSR has none.
    """
    try:
        names = (csr.names, _alternative_names(leaf.extensions))
        asked, got = ({f"{kind}:{_spelled(text)}" for kind, text in found} for found in names)
        others = [] if _same_key(leaf.key, csr.key) else ["another key"]
        others += ["a CA certificate"] if _signs_certificates(leaf.extensions) else []
        if UNREADABLE in leaf.extensions:
            raise CMPError("its extensions are malformed, or one is there twice")
    except (CMPError, IndexError, ValueError) as err:
        return f"it cannot be compared with the CSR: {err}"
    asked_values, got_values = ({_spelled(text) for _, text in found} for found in names)
    asked_names, got_names = _common_names(csr.subject), _common_names(leaf.subject)
    if csr.lonely():
        asked_names, got_names = _cn_texts(csr.subject), _cn_texts(leaf.subject)
    sent = [] if csr.subject else re.findall(r"(?<!\\)[/+]cn=((?:\\.|[^\\/+])*)", subject, re.I)
    said = {"", *(_spelled(re.sub(r"\\(.)", r"\1", text)) for text in sent)}
    said |= {name for name in _cn_texts(csr.subject) if name in asked_values or not asked}
    missing = sorted(asked - got if asked else asked_names - got_values - got_names)
    added = sorted(name for name in got - asked if name.partition(":")[2] not in said)
    added += sorted(f"CN={name}" for name in got_names - asked_values - said)
    found = [f"{what} {', '.join(those)}" for what, those in (("missing", missing), ("added", added)) if those]
    return _one_line("; ".join(found + others), 2 * MAX_TEXT)


def _same_key(one: bytes, other: bytes) -> bool:
    """Whether two subjectPublicKeyInfos hold the same key. Raises CMPError or IndexError where one is malformed."""
    short, long = sorted((_sequence(key)[1].value[1:] for key in (one, other)), key=len)
    # A CA may compress an EC point (SEC 1, 2.3.3): its first octet then says whether y is odd.
    compressed = long[:1] == b"\x04" and short == bytes([2 + (long[-1] & 1)]) + long[1 : len(short)]
    return short == long or (compressed and len(long) == 2 * len(short) - 1)


# --- The configuration --------------------------------------------------------------------------------------


class Option(NamedTuple):
    """What is special of an option of `openssl cmp`, or of an entry of our own."""

    kind: str = "-"
    marks: Sequence[str] = ()
    weak: str = ""  # why it weakens security

    @property
    def fixed(self) -> bool:
        """Whether a profile, which belongs to an ACME client's account, may not set it."""
        return "fixed" in self.marks or self.kind in ("ours", "run", "other", "secret") or bool(self.weak)


def _table(text: str) -> list[tuple[str, str, str]]:
    """The first word of each row, its other words, and what stands behind the arrow; an indented line goes on."""
    return re.findall("^(.+?) (.+?) -> (.+)$", text.replace("\n    ", " "), re.M)


# Names of options, a colon, and what is special of them:
# kind    ours: no option of openssl; run: set by the handler for each run, ignored with a warning; other: no enrolment;
#         secret: reaches openssl in its environment, for any local user can read an argument list;
#         name: a distinguished name; file, files, key: a path, a list of paths, a private key; number; -: any text
# marks   fixed: no profile sets it: the program and what it loads, credentials, and how long it keeps a worker busy;
#         enrolment: no part of a revocation; ir: nor of a p10cr; tls: nothing without TLS
# weak    behind a comma: why the option weakens security; no profile sets it
# An option without a row has nothing special. To add one of our own: its name in the row `ours`, which no profile sets;
# what is wrong with a value, a row in VALUE_FAULTS under its name (for a number, all but digits: kind `number` is not
# for ours); its field in Settings; in `_read_section` its default, its value beside `san_types`, behind `_check_text`,
# and its place in `Settings(...)`; what it does, in `CAhandler.enroll`, whose CMPError is a REQUEST (in `_read_csr`,
# orders that wait would be refused, too); its line in docs/configuration.md.
OPTIONS_TABLE = """
openssl_bin tmp_dir ref_variable secret_variable san_types refuse_changes: ours
server path proxy no_proxy ignore_keyusage: -
recipient expect_sender: name
issuer subject: name enrolment ir
ref cmd section keyform engine provider provider-path provparam propquery rand writerand tls_used: - fixed
popo: - fixed enrolment
config cert: file fixed
key: key fixed
secret keypass otherpass: secret
srvcert: file
trusted untrusted own_trusted extracerts: files
out_trusted: files enrolment
tls_cert: file fixed tls
tls_key: key fixed tls
tls_keypass: secret tls
tls_extra tls_trusted: files tls
tls_host: - tls
implicit_confirm disable_confirm profile verify_hostname verify_email verify_ip: - enrolment
days: number enrolment ir
reqexts policies policy_oids policy_oids_critical: - enrolment ir
msg_timeout total_timeout verbosity: number fixed
keep_alive verify_depth auth_level: number
attime: number, certificates are believed that have expired or are not yet valid
unprotected_errors: -, anyone on the way to the CA can refuse in its name
unprotected_requests: -, requests are not protected, so only TLS can tell the CA who sends them
ta_in_ip_extracerts: -, anyone on the way can answer as the CA, in spite of cmp_trusted
nonmatched_error_nonces: -, anyone who has recorded an error message can refuse an order with it
no_check_time: -, expired certificates are believed
ignore_critical: -, what a certificate forbids may be overlooked
allow_proxy_certs: -, anyone who has a certificate can make more of them
newkey newkeypass csr sans san_nodefault certout chainout extracertsout cacertsout srvcertout certform: run
rspin rspout reqout oldcert revreason batch: run
help repeat reqin reqin_new_tid reqout_only use_mock_srv centralkeygen newkeyout infotype template serial keyspec: other
oldwithold newwithnew newwithold oldwithnew crlcert oldcrl crlout crlform srv_cert mock_srv: other
"""
OPTIONS = {
    name: Option(words.split()[0], words.split()[1:], weak)
    for names, special in (line.split(": ", 1) for line in OPTIONS_TABLE.strip().splitlines())
    for words, _, weak in [special.partition(", ")]
    for name in names.split()
}
NOTHING_SPECIAL = Option()
OURS = frozenset(name for name, option in OPTIONS.items() if option.kind == "ours")
ON, OFF = ("true", "yes", "on"), ("false", "no", "off")
MSG_TIMEOUT, TOTAL_TIMEOUT = 5, 10  # seconds
NO_TIMEOUT = 30  # seconds for openssl where it is told of no time-out
EXPIRES_SOON = 30 * 86400  # seconds


def _option(name: str) -> Option:
    """What is special of an option."""
    return OPTIONS.get(name, NOTHING_SPECIAL)


class Settings(NamedTuple):
    """The `[CAhandler]` section, read and checked."""

    binary: Binary
    directory: str
    own_directory: bool  # nobody configured it: a directory of ours under the system's temporary directory
    options: Mapping[str, str | None]  # openssl's option -> value; None for a switch
    secrets: Mapping[str, str]  # environment variables for openssl
    environment: Mapping[str, str] | None  # all of them; None: those of this process
    hidden: Sequence[str]  # what must appear nowhere (see `_hide`)
    refuse_changes: bool  # revoke a certificate that is not what was asked for
    san_types: Sequence[str]  # the kinds of subjectAltNames that a CSR may have
    errors: Sequence[str] = ()
    warnings: Sequence[str] = ()
    directory_fault: str = ""
    state: object = None  # what all this depends on

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

    def without_enrolment(self, command: str) -> Settings:
        """For another command than an enrolment: the same server and credentials."""
        options = {o: value for o, value in self.options.items() if "enrolment" not in _option(o).marks}
        return self._replace(options={**options, "cmd": command})


_known: dict[object, Settings] = {}  # without a fault, by all that they depend on


def _settings(section: Mapping[str, str]) -> Settings:
    """The section, read again only where it, the environment or a file that it names has changed.

    Starts no process but to ask a new openssl what it can do.
    """
    state = _state(section)
    now = (state, time.time() // 3600)  # certificates expire: what is said of them is an hour old at the most
    settings = _known.get(now)
    if settings is None:
        settings = _read_section(section)
        if len(_known) > 100:  # profiles can make any number
            _known.clear()
            _dry_runs.clear()
        if not settings.errors:
            _known[now] = settings
    fault = _directory_fault(settings.directory, settings.own_directory)  # in any directory above it
    return settings._replace(state=state, directory_fault=fault, errors=[*settings.errors, *filter(None, [fault])])


def _state(section: Mapping[str, str]) -> object:
    """All that the settings depend on, save for the time and the directories above cmp_tmp_dir."""
    files, program = [], "openssl"
    for key, value in section.items():
        option, text = _option_name(key[4:]), _utf8(str(value).strip())
        if _option(option).kind in ("file", "files", "key", "secret"):
            files += [name.removeprefix("file:").strip() for name in _file_list(option, text)]
        elif option == "openssl_bin":
            program = text or program
    program = program if os.path.isabs(program) and sys.platform != "win32" else shutil.which(program) or ""
    states = tuple((name, *_file_state(name)) for name in [*files, program])
    here = os.stat(os.curdir)  # its path may be gone
    user = os.geteuid() if sys.platform != "win32" else 0  # a server may give up root
    return (tuple(section.items()), tuple(os.environ.items()), here.st_dev, here.st_ino, user, states)


def _file_state(path: str) -> tuple[int, ...]:
    """What changes with a file; nothing where there is none."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return ()
    return (info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_ino)


def _read_section(section: Mapping[str, str]) -> Settings:
    """The settings, without a look at cmp_tmp_dir."""
    # Each key under the name that this file has for it: `cmp_tmpdir` is `cmp_tmp_dir`.
    names = {key: "cmp_" + _option_name(key[4:]) if key.startswith("cmp_") else key for key in section}
    twice = [(key, name) for key, name in names.items() if name != key and name in section]
    errors = [f"{key} is another spelling of {name}, which is there, too: delete one" for key, name in twice]
    section = {names[key]: str(value).strip() for key, value in section.items()}
    binary, san_types = Binary(), sorted(CHECKED_KINDS)
    try:
        binary = _binary(section.get("cmp_openssl_bin") or "openssl")
    except (CMPError, OSError) as err:
        if getattr(err, "kind", CONFIGURATION) != CONFIGURATION:  # no fault of these settings
            raise
        errors.append(str(err))
    options: dict[str, str | None] = {"cmd": "ir", "popo": "0"}
    secrets: dict[str, str] = {}
    for key, value in section.items():
        option = _option_name(key[4:], binary.options)
        variable = option in ("ref_variable", "secret_variable") and not section.get(f"cmp_{option[:-9]}")
        if variable:  # a configured value takes precedence
            option, value = option[:-9], f"env:{value}"
        elif not value and f"{key}_variable" in section:
            continue  # left to the variable
        try:
            _check_entry(key, option, binary)
            if option in OURS:
                _check_text(option, value)
                san_types = _san_types(value) if option == "san_types" else san_types
            elif _option(option).kind != "run":
                options.pop(option, None)  # the configured ones in their order, after the defaults
                if variable or value.lower() not in OFF or option in ("profile", "cmd", "popo"):
                    options[option] = ""  # there, if not usable: so nothing says that it is missing
                    if variable and option == "ref":
                        _check_text("reference", _variable_value(value[4:]))
                        options["ref"] = _variable_value(value[4:])
                    else:
                        options[option], named = _read_value(option, value, binary)
                        secrets.update(named)
        except CMPError as err:
            errors.append(f"{_one_line(key, 60)}: {err}")
    own, refuse = not section.get("cmp_tmp_dir"), section.get("cmp_refuse_changes", "").lower() in ON
    # The process may change its own directory.
    directory = _openssl_path(_utf8(os.path.abspath(_default_directory() if own else section["cmp_tmp_dir"])))
    _add_defaults(options, binary)
    environment, hidden = {**os.environ, **secrets} if secrets else None, _hidden(secrets)
    settings = Settings(binary, directory, own, options, secrets, environment, hidden, refuse, san_types)
    meant = re.findall(r"did you mean (cmp_\w+)\?", " ".join(errors))  # what else is said of these is untrue
    findings = [(text, fatal) for wrong, text, fatal in _findings(section, settings) if wrong]
    findings = [(text, fatal) for text, fatal in findings if not any(name in text for name in meant)]
    errors += [text for text, fatal in findings if fatal]
    return settings._replace(errors=errors, warnings=[text for text, fatal in findings if not fatal])


def _check_entry(key: str, option: str, binary: Binary) -> None:
    """Raise CMPError where a key of the section means nothing that an enrolment has."""
    kind, known, shown = _option(option).kind, binary.options, _one_line(option, 60)
    if not key.startswith("cmp_"):
        meant = "cmp_" + re.sub(r"^cmp[^a-z]?", "", key.lower()).replace("-", "_")
        raise CMPError(f"is not an entry of this handler; did you mean {_one_line(meant, 60)}?")
    if kind == "other" or option in binary.mock_server:
        near = "; did you mean cmp_srvcert?" if option == "srv_cert" else ""
        raise CMPError(f"-{shown} is not for enrolling at a CA: delete it{near}")
    if known and option not in known and kind not in ("ours", "run"):
        base = option.removesuffix("_variable")
        _raise_first(
            (option == "profile", f"needs OpenSSL 3.3 or later, this is {binary.version}"),
            (base != option and _option(base).kind == "secret", f"write cmp_{base}: env:NAME"),
        )
        usable = {name for name in known if _option(name).kind not in ("run", "other")} - binary.mock_server
        raise CMPError(f"this openssl has no option -{shown}{_did_you_mean(option, usable | OURS, 'cmp_')}")


def _raise_first(*faults: tuple[object, str]) -> None:
    """Raise CMPError with the text of the first fault that there is."""
    for wrong, text in faults:
        if wrong:
            raise CMPError(text)


def _read_value(option: str, value: str, binary: Binary) -> tuple[str | None, dict[str, str]]:
    """The value for openssl, None for a switch, and the environment variables that it names. Raises CMPError."""
    kind, switch = _option(option).kind, value.lower() in ON and option != "profile"
    if binary.options and binary.options[option] == switch:
        raise CMPError("needs a value, not True" if switch else "is a switch: set it to True or False")
    if switch:
        return None, {}
    _raise_first((not value or "\0" in value, "has no value: give it one, or delete the line"))
    _check_text(option, value)
    value = _utf8(value)
    if kind == "secret":
        name, secret = _secret(option, value)
        return f"env:{name}", {name: secret}
    names = _file_list(option, value)
    for name in names if kind in ("file", "files", "key") else ():
        _check_file(name, "private key" if kind == "key" else "certificate" if option != "config" else "")
    return _utf8(_slash_dn(value, binary)) if kind == "name" else ",".join(names), {}


# Kinds or names of options (with !: all but these), a regular expression -> what is wrong with a value that matches.
VALUE_FAULTS = _table(r"""
reference ^\s|[\r\n]|\s$ -> begins or ends with a blank or a line break, or has more than one line
!secret -----BEGIN -> is the content of a file: write its path
!files [\r\n] -> has more than one line: what is indented belongs to the line above it
files ^\[.*\]$ -> is a list: write the files into one line, with commas between them
secret ^(['"]).*\1$|^[\u2018-\u201f].*[\u2018-\u201f]$ ->
    write the value without the quotes; if it belongs to the secret, write pass: before that
!secret ^(['"]).*\1$|^[\u2018-\u201f].*[\u2018-\u201f]$ -> write the value without the quotes
secret ^(?!pass:).*\s[#;] -> a comment needs a line of its own; if it belongs to the secret, write pass: before that
name \s[#;](\s|$) -> a comment needs a line of its own; if it belongs to the name, write a backslash before it
!name/secret/reference \s[#;] -> a comment needs a line of its own
!secret (?i)pin-value\s*= -> every local user can see the PIN: write pin-source=file:PATH, or cmp_keypass: env:NAME
provparam (?i)(pin|pass|secret)[^=]*=(?!file:) -> every local user can see it: write file:PATH, or cmp_keypass: env:NAME
server/proxy @ -> a user and password there are visible to every local user, and openssl ignores them: remove
server/proxy ^(https?://)?[^/[]*:[^/[]*: -> an address of IPv6 needs brackets, such as [2001:db8::1]:8080
server/proxy ^(?!(?:https?://)?(?:\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[\w.-]+)(?::[^/]*)?(?:/|/[^/\s]\S*)?$)(.*) ->
    '\1' is no address such as 192.168.14.137:8080 or cmp.acme.test:8080
server/proxy ^(?:https?://)?(?:\[[^]]*\]|[^:/[]*):(?!//|0*(?:[1-9]\d{0,3}|[1-5]\d{4}|6[0-5]\d{3})(?:/|$))([^/]*) ->
    '\1' is no port: 1 to 65535 are possible
tls_host [^\w.:-]|^[^:]*:[^:]*$ -> is the name in the server's certificate alone, such as cmp.acme.test
profile ^- -> begins with a hyphen, and openssl would read it as an option
secret ^(\$\{?\w+\}?|%\w+%)$ -> is no variable: write env:NAME; if it is the secret itself, write pass: before it
secret ^(?!(?:env|file|pass):)((?i:env|file|pass))[:=] ->
    write \1 in small letters, with a colon; if it is the secret itself, write pass: before it
secret ^(stdin$|fd(?=:)) -> \1: acme2certifier has neither a terminal nor a descriptor: use file:PATH or env:NAME
secret ^pass:$ -> the secret is empty
tmp_dir/openssl_bin ^~|[$%] -> is taken as it is written, without a shell: write the whole path
!secret ^(\$\{?\w+\}?|%\w+%)$ -> is no variable: write the value itself
path \s|^\w+:// -> is the path on the server alone, such as pkix/, without a blank
refuse_changes (?i)^(?!(true|yes|on|false|no|off|)$) -> is a switch: set it to True or False
msg_timeout/total_timeout ^(?!\d{1,6}$) -> must be a number of seconds
number ^(?!\d{1,12}$) -> must be a number
verbosity ^[012]$ -> is too low: openssl then prints no errors, and nobody knows what failed
cmd ^(?!(ir|cr|p10cr)$) -> only ir, cr and p10cr enrol a certificate
popo ^(?!(-1|0)$) -> only 0 (raVerified) and -1 (none) are possible: the private key stays with the client
keyform ^(?!(PEM|P12|pem|p12)$) -> openssl applies it to the request's public key, too, and fails;
    for an engine: org.openssl.engine:pkcs11:... as cmp_key
""")


def _check_text(option: str, value: str) -> None:
    """Raise CMPError where the configuration file has left something in a value, or openssl would misread it."""
    mine = {option, _option(option).kind}
    unseen = next((c for c in value if not (c.isprintable() or c in "\t\r\n" or "\ud800" <= c <= "\udfff")), "")
    if unseen and not value.startswith("pass:"):
        raise CMPError(f"holds a character that nobody sees, U+{ord(unseen):04X}: type the value anew")
    for names, fault, text in VALUE_FAULTS:
        if mine.isdisjoint(names.strip("!").split("/")) != names.startswith("!"):
            continue
        found = re.search(fault, value, re.S | re.A)
        if found:
            raise CMPError(_one_line(found.expand(text)))


PKCS7 = "PKCS #7 (convert it: openssl pkcs7 -print_certs)"
PEM_KINDS = {"PKCS7": PKCS7, "CMS": PKCS7, "X509 CRL": "a CRL", "": "something that is neither PEM nor DER"}


def _check_file(name: str, content: str) -> None:
    """Raise CMPError where a file cannot be read, or holds something else than `content`; openssl reads DER."""
    shown = _one_line(name, 100)
    if content and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name) and not os.path.exists(name):
        return  # a URI such as pkcs11:, which is openssl's to open
    try:
        plain, closed = stat.S_ISREG(os.stat(name).st_mode), not os.access(name, os.R_OK)
    except (OSError, ValueError) as err:
        plain, closed = False, isinstance(err, PermissionError)  # of a directory above it
    if closed or not plain:
        raise CMPError(f"{shown} {f'cannot be read by {_user()}' if closed else 'is not a file'}")
    if not content:
        return
    with open(name, "rb") as file:
        data = file.read(1 << 24)
    labels = [label.decode() for label in re.findall(rb"-----BEGIN ([A-Z0-9 ]+)-----", data)]
    labels = labels or [""] * (data[:1] != b"\x30")
    kinds = " and ".join(dict.fromkeys(PEM_KINDS.get(label, f"a {label.lower()}") for label in labels))
    wrong = labels and not any(label.endswith(content.upper()) for label in labels)
    begun = sum(label.endswith("CERTIFICATE") for label in labels) if content == "certificate" else 0
    mark = rb"-----%s (?:[A-Z0-9]+ )?CERTIFICATE-----\s"
    whole = b"^(?:\xef\xbb\xbf)?" + mark % b"BEGIN" + rb"[A-Za-z0-9+/=\s]+^" + mark % b"END"
    broken = begun - len(re.findall(whole, data + b"\n", re.M)) if begun else 0
    _raise_first(
        (not data.strip(), f"{shown} is empty"),
        (wrong, f"{shown} holds no {content}, but {kinds}"),
        (broken, f"{shown} holds {begun} certificates, {broken} of them cut short, or not at the start of a line"),
    )


def _file_list(option: str, value: str) -> list[str]:
    """The files that an option names: openssl splits some at commas and blanks, and knows no escape for a blank."""
    if _option(option).kind != "files":
        return [value]
    return [name for name in re.split(r"[,\s]+", _openssl_path(value)) if name]


# In openssl's notation, /C=DE/CN=x, and in RFC 4514's, C=DE, CN=x: what stands before an attribute, its type, its value
# in quotes (of RFC 4514's predecessors) or without; or what is no attribute.
SLASH_ATTRIBUTE = re.compile(r"/*([/+])([^=/+\\]*)=()((?:[^/+\\]|\\.)*)(?=[/+]|$)|(?!/*$)(.+)", re.S)
COMMA_ATTRIBUTE = re.compile(
    r'([,+])\s*([\w.-]+)\s*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|((?:[^,+;"\\]|\\.)*))\s*(?=[,+]|$)|(.+)', re.S
)
ESCAPE = re.compile(rb"\\([0-9A-Fa-f]{2})|\\([^\w\t\n]|_)", re.S)
DN_ALIASES = dict(
    pair.split("=")
    for pair in (
        "E=emailAddress EMAIL=emailAddress S=ST SP=ST T=title G=GN I=initials DNQ=dnQualifier PHONE=telephoneNumber"
        " POBOX=postOfficeBox GENERATION=generationQualifier JURISDICTIONCOUNTRY=jurisdictionC"
        " JURISDICTIONSTATE=jurisdictionST JURISDICTIONLOCALITY=jurisdictionL"
    ).split()
)


def _slash_dn(value: str, binary: Binary) -> str:
    """`C=DE, CN=x` in openssl's notation, `/C=DE/CN=x`; that stays. Raises CMPError where openssl would misread it."""
    value = re.sub(r"^(?:subject|issuer)\s*=\s*(?=/|[\w.]+\s*=)", "", value)  # as `openssl x509 -subject` prints it
    text = ""
    for separator, kind, part in _attributes(value):
        _raise_first((not kind, f"'={_one_line(part, 60)}' has no attribute type such as CN"))
        if not part or "\0" in part:
            raise CMPError(f"{_one_line(kind, 60)}: has {'a NUL in its' if part else 'no'} value")
        short = _attribute_type(kind, binary)
        text += f"{separator if text else '/'}{short}=" + re.sub(r"([\\/+])", r"\\\1", part)
    return text or "/"


def _attributes(value: str) -> Iterator[tuple[str, str, str]]:
    """Separator (a slash or a plus sign), type and value of each attribute of a name in either notation."""
    slashes = value.startswith("/")
    found = SLASH_ATTRIBUTE.findall(value) if slashes else COMMA_ATTRIBUTE.findall(f",{value}")
    for separator, kind, quoted, plain, rest in found:
        if rest:
            hint = "in a value, write \\, \\+ \\; \\/ for these signs, \\\\ for a backslash"
            what = "is not a distinguished name such as C=DE, CN=Issuing CA: separate attributes with commas;"
            raise CMPError(f"'{_one_line(rest[1:] or rest, 60)}' {what} {hint}")
        kind, text = kind.strip(), plain or quoted
        merged = re.search(r"(?:\s|(?<!\\)/)([A-Za-z]+) ?=", plain)
        if merged and merged.group(1).upper() in DN_TYPES:
            hint = f"write a {'slash' if slashes else 'comma'} before it, or \\= if it is no attribute"
            raise CMPError(f"{kind}: its value contains {merged.group(1)}=: {hint}")
        if slashes and re.search(r"\\\w", plain.replace(r"\\", "")):  # of other notations: openssl reads C3 for \C3
            raise CMPError("write the character itself for its code, or \\\\ for a backslash")
        if not slashes:
            text = quoted or re.sub(r"((?<!\\)(?:\\\\)*\\\s)?\s*$", r"\1", plain)  # an escaped blank stays
            number = "write the text itself for #hex, or \\# for a number sign at the start"
            _raise_first((plain[:1] == "#", f"{kind}: {number}"))
        yield separator.replace(",", "/"), kind, _unescaped(kind, text)


def _unescaped(kind: str, text: str) -> str:
    r"""The value of an attribute without its escapes: `\,` and RFC 4514's `\C3\BC`. Raises CMPError."""
    value = text.encode("utf-8", "surrogateescape")
    _raise_first((b"\\" in ESCAPE.sub(b"", value), f"{kind}: write two backslashes for one in its value"))
    try:
        return ESCAPE.sub(lambda found: bytes.fromhex(found[1].decode()) if found[1] else found[2], value).decode()
    except UnicodeDecodeError as err:
        raise CMPError(f"{kind}: its value is not UTF-8: write two backslashes for one") from err


def _attribute_type(kind: str, binary: Binary) -> str:
    """openssl's short name of an attribute type. Raises CMPError where it has none, for it would leave it out."""
    number = re.sub("^oid[.]", "", kind, flags=re.I)
    if kind == "uid":
        raise CMPError("uid: openssl means another attribute than others: write UID (userId) or uniqueIdentifier")
    short = ATTRIBUTES[number][0] if number in ATTRIBUTES else DN_TYPES.get(kind.upper(), "")
    if short or not binary.path:
        return short or kind
    names = _object_names(binary.path, binary.version)
    short = names.get(number) or names.get(number.casefold(), "")
    if not short:
        near = _did_you_mean(kind, {*DN_TYPES.values()}, "")
        raise CMPError(f"openssl does not know the attribute {_one_line(kind, 60)} and would leave it out{near}")
    return short


# Where a secret could come out, and what keeps it in:
#   openssl's arguments   `_read_value` puts `env:NAME` there; VALUE_FAULTS refuses PINs and passwords in other options
#   openssl's environment `Settings.environment` is for its processes alone; its user and root can read it, and what
#                         acme2certifier's own environment holds
#   the log, errors       openssl's lines, the CA's texts, and names in its certificates pass `_hide`, each as a whole
#                         (`_foreign`, `Transaction.warn`): it masks `Settings.hidden`, from four characters on, and
#                         what looks like a secret; none of our texts shows a secret, only the path behind `file:`
#   unexpected exceptions `_explained` shows type and line, never the text
#   what cannot be read   `_unreadable` tells the number of the line, `_our_entries` the key: neither what is in it
#   files                 none is written with one: what `cmp_secret: file:` names we read, not openssl; a profile
#                         cannot set one (`Option.fixed`)
#   the command line      `check` shows no value of a secret, nor of an entry that it does not know, nor an address
#                         with a user in it (`_shown`); `convert` prints what was typed, with a warning


def _secret(option: str, value: str) -> tuple[str, str]:
    """The environment variable for openssl's `-secret` and the like, and what it is to hold. Raises CMPError."""
    source, colon, rest = value.partition(":")  # openssl-passphrase-options(1); without a source, the secret
    name, secret = "CMP_CA_HANDLER_" + option.upper(), value
    if colon and source == "env":
        name, secret = rest.strip(), _variable_value(rest.strip())
    elif colon and source in ("file", "pass"):
        secret = _first_line(rest.strip()) if source == "file" else rest
    _raise_first((re.search(r"[\r\n\0]", secret), "the secret contains a line break: take it out"))
    return name, secret


def _first_line(path: str) -> str:
    """The first line of a file: openssl takes the same. Raises CMPError where it is not what it seems."""
    _check_file(path, "")
    with open(path, "rb") as file:
        line, where = file.readline(1025).rstrip(b"\n"), f"file:{_one_line(path, 100)}"
    _raise_first(
        (line[:3] == b"\xef\xbb\xbf", f"{where} begins with a byte order mark: save it as UTF-8 without BOM"),
        (b"\r" in line, f"{where} has line ends of Windows, which openssl would take, too: save it with LF alone"),
        (len(line) > 1023, f"the first line of {where} has more than 1,023 bytes"),
        (not line.strip() or b"\0" in line, f"the first line of {where} is empty, or no text in UTF-8 or ASCII"),
    )
    return os.fsdecode(line)


def _variable_value(name: str) -> str:
    """What an environment variable holds. Raises CMPError where it is not set."""
    # Perhaps the secret itself was put there by mistake.
    shown = re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", name)
    what = f"the environment variable {name}" if shown else "the variable named there (perhaps a secret)"
    _raise_first(
        (not name, "names no variable"),
        (re.match("env:|[$%'\"]", name), "write the name of the variable alone"),
        (not os.environ.get(name), f"{what} is not set"),
    )
    return os.environ[name]


def _add_defaults(options: dict[str, str | None], binary: Binary) -> None:
    """Add what is not configured of the options that each run needs."""
    if "config" in binary.options and "section" not in options:
        options.setdefault("config", "")  # the system's openssl.cnf may have a section cmp that nobody here knows of
    message, total = options.get("msg_timeout"), options.get("total_timeout")
    options["msg_timeout"] = message or str(min(MSG_TIMEOUT, int(total or MSG_TIMEOUT)))
    options["total_timeout"] = total or str(max(TOTAL_TIMEOUT, int(message or 0) + MSG_TIMEOUT))
    if "keep_alive" in binary.options:
        options.setdefault("keep_alive", "0")  # a CA may tie a transaction to its connection, and we may come back


def _san_types(value: str) -> list[str]:
    """The kinds of subjectAltNames that cmp_san_types allows. Raises CMPError where there is no such kind."""
    known, words = {kind.lower(): kind for kind in SAN_KINDS.values()}, re.split(r"[,\s]+", value.strip(", "))
    for word in words:
        if word.lower() not in known:
            near = _did_you_mean(word, known.values(), "")
            raise CMPError(f"'{_one_line(word, 40)}' is none of {', '.join(known.values())}{near}")
    kinds = {known[word.lower()] for word in words}
    # Where it names none of the usual ones, it adds to them: no ACME client asks for a certificate without.
    return sorted(kinds if kinds & CHECKED_KINDS else kinds | CHECKED_KINDS)


Finding = tuple[str, bool]  # what is wrong with the configuration; whether that stops everything, or is a warning
Question = tuple[object, str, bool]  # whether it is so, and then the Finding
FATAL, WARNING = True, False
# What is missing, and what does nothing, or something else, beside another entry: the level; an option that is there,
# or one of several, or those with a mark of OPTIONS ({} names them); what else is there, and with ! what is not -> what
# to say. For capitals see `_combination_findings`.
COMBINATIONS = _table("""
error cmd !server !ELSEWHERE -> cmp_server is missing: set it to the address:port of the CMP server
warning config/section ELSEWHERE -> {}: what stands in that OpenSSL configuration file is not checked here
warning cert !secret !trusted !srvcert !unprotected_requests !ELSEWHERE ->
    cmp_trusted is not set: the CA's signed answers cannot be verified
warning trusted !srvcert !expect_sender !ELSEWHERE -> cmp_trusted without cmp_expect_sender or cmp_srvcert: anyone
    who holds a certificate from this CA and can intercept the connection could pose as the CA; set cmp_expect_sender
warning TLS !tls_trusted !ELSEWHERE -> cmp_tls_trusted is not set: the TLS server is not authenticated
error HTTPS !TLS !ELSEWHERE -> cmp_tls_used is missing: this openssl needs cmp_tls_used: True for https://
warning tls NO_TLS !TLS !HTTPS !ELSEWHERE -> {}: not used, the connection is plain HTTP
error tls !NO_TLS !TLS !HTTPS !ELSEWHERE ->
    {} without cmp_tls_used: the connection is plain HTTP: set cmp_tls_used: True
warning cert secret !key !ELSEWHERE -> cmp_cert without cmp_key: only the names in it are used
warning key secret !cert !ELSEWHERE -> cmp_key without cmp_cert: set both, or none
error tls_cert !tls_key !ELSEWHERE -> cmp_tls_cert without cmp_tls_key: set both, or none
error tls_key !tls_cert !ELSEWHERE -> cmp_tls_key without cmp_tls_cert: set both, or none
warning keypass !key !ELSEWHERE -> cmp_keypass without cmp_key: there is no key for it
warning tls_keypass !tls_key !ELSEWHERE -> cmp_tls_keypass without cmp_tls_key: there is no key for it
warning secret !ref !cert -> cmp_secret without cmp_ref: most CAs then do not know whose secret it is
warning recipient srvcert -> cmp_recipient: not used beside cmp_srvcert, whose subject is the recipient
warning policy !explicit_policy -> cmp_policy does nothing without cmp_explicit_policy: True
warning explicit_policy !policy ->
    cmp_explicit_policy without cmp_policy refuses every signer: set cmp_policy, to 2.5.29.32.0 for any policy
warning out_trusted !untrusted -> cmp_out_trusted without cmp_untrusted:
    whoever takes the issuers out of an answer has its certificate refused; set cmp_untrusted, too
warning verify_hostname/verify_email/verify_ip !out_trusted ->
    {}: about the issued certificate, and not used without cmp_out_trusted
warning ir cmd=p10cr -> {}: not used with cmp_cmd: p10cr, for the request is the CSR as it is
error popo=-1 RECENT !cmd=p10cr -> cmp_popo: this openssl sends no request without a proof: delete it
""")


def _findings(section: Mapping[str, str], settings: Settings) -> Iterator[Question]:
    """What neither a single entry nor openssl shows: what is missing, does nothing, weakens security, or ends soon."""
    options, first = settings.options, f"using {settings.binary.path or 'openssl'}, the first on the PATH"
    lost = "there, a restart or systemd's PrivateTmp loses orders that wait for the CA"
    yield not section.get("cmp_openssl_bin"), f"cmp_openssl_bin is not set: {first}", WARNING
    yield settings.own_directory, f"cmp_tmp_dir is not set: using {settings.directory}; {lost}", WARNING
    for key in section:
        ignored = key.startswith("cmp_") and _option(key[4:]).kind == "run"
        yield ignored, f"{key} is set by the handler itself and ignored here: delete it", WARNING
    for option in options:
        yield _option(option).weak, f"cmp_{option} weakens security: {_option(option).weak}", WARNING
        yield from _credential_findings(option, section.get(f"cmp_{option}", ""), settings)
    yield from _combination_findings(section, settings)
    yield from _proxy_findings(settings)
    wrong = settings.seconds("total_timeout") < settings.seconds("msg_timeout")
    yield wrong, "cmp_total_timeout must be at least cmp_msg_timeout; 0 is possible for both only", FATAL


def _credential_findings(option: str, configured: str, settings: Settings) -> Iterator[Question]:
    """Secrets that are easy to find out, or that look like a mistake; certificates that have expired, or soon will."""
    key, kind, value = f"cmp_{option}", _option(option).kind, settings.options[option] or ""
    path, secret = value.removeprefix("file:"), ""
    if kind == "secret":
        path = configured[5:].strip() if configured.startswith("file:") else ""
        secret = settings.secrets.get(value.partition(":")[2], "")
    if kind in ("key", "secret"):
        open_to_all = os.name == "posix" and os.path.isfile(path) and os.stat(path).st_mode & 0o004
        yield open_to_all, f"{key}: every local user can read {_one_line(path, 100)}: chmod o-r", WARNING
    quoted, short = re.fullmatch(r"(['\"]).*\1", secret, re.S), option == "secret" and 0 < len(secret) < 8
    guess = "one captured message is enough to guess it; ask the CA for a longer one"
    yield secret != secret.strip(), f"{key}: the secret begins or ends with a blank, which counts", WARNING
    yield quoted, f"{key}: the secret stands in quotes, which count (as with docker run --env-file)", WARNING
    yield short, f"cmp_secret has fewer than 8 characters: {guess}", WARNING
    yield os.path.isfile(secret), f"{key}: the secret is the name of a file: write file: before it", WARNING
    yield secret in os.environ, f"{key}: the secret is the name of a variable: write env: before it", WARNING
    # Where a secret protects the messages, cmp_cert is not used, except for the default of cmp_recipient.
    level = WARNING if option == "cert" and "secret" in settings.options else FATAL
    now, soon = _iso(time.time()), _iso(time.time() + EXPIRES_SOON)
    for found in _configured_certificates(path)[:1] if option in ("cert", "tls_cert") else ():
        what, start, end = f"{key}: the certificate in {_one_line(path, 100)}", found.not_before, found.not_after
        yield start > now, f"{what} is not valid before {start[:10]}", level
        yield end <= now, f"{what} has expired on {end[:10]}: renew it", level
        yield now < end <= soon, f"{what} expires on {end[:10]}: renew it", WARNING


def _combination_findings(section: Mapping[str, str], settings: Settings) -> Iterator[Question]:
    """What COMBINATIONS says of these settings."""
    options = settings.options
    capitals = {
        "ELSEWHERE": options.get("config") or "section" in options,  # in an OpenSSL configuration file
        "HTTPS": (options.get("server") or "").startswith("https://"),
        "NO_TLS": section.get("cmp_tls_used", "").lower() in OFF,
        "RECENT": settings.binary.since(3, 5),
        "TLS": settings.tls,
    }
    words = {word: [word] for word, so in capitals.items() if so}
    for option, value in options.items():
        for word in (option, f"{option}={value}", *_option(option).marks):
            words.setdefault(word, []).append(f"cmp_{option}")
    for level, row, text in COMBINATIONS:
        first, *others = row.split()
        names = [name for word in first.split("/") for name in words.get(word, ())]
        so = names and all((word.strip("!") in words) != word.startswith("!") for word in others)
        yield so, text.replace("{}", ", ".join(names)), level == "error"


def _hidden(secrets: Mapping[str, str]) -> Sequence[str]:
    """Secrets, and the passwords of proxies, in each spelling that a text may have, the longest first.

    One of less than four characters would hide everything else.
    """
    users = [re.sub(r"^\w+://", "", os.environ[name].rpartition("@")[0]) for name in _proxies()]
    spelled: set[str] = set()
    for secret in [*secrets.values(), *(text for user in users for text in (f"{user}@", user.partition(":")[2]))]:
        printed = os.fsencode(secret).decode("utf-8", "replace")  # as a program's output is read: see _utf8()
        spelled |= {secret, printed, _one_line(printed, len(printed) + 1), _escaped(printed)}
    return sorted((text for text in spelled if len(text) > 3), key=len, reverse=True)


def _proxies() -> list[str]:
    """The environment variables from which openssl takes a proxy."""
    return [name for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY") if os.environ.get(name)]


def _proxy_findings(settings: Settings) -> Iterator[Question]:
    """Say which proxy openssl takes from the environment."""
    options, tls = settings.options, settings.tls
    proxies = [name for name in _proxies() if tls or name.lower() == "http_proxy"]
    host = re.sub(r"^https?://|(:\d+)?(/.*)?$", "", options.get("server") or "").strip("[]")
    excluded = options.get("no_proxy") or os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    what = f"openssl takes the proxy from {', '.join(proxies)}, and sends it no user and password"
    if tls and len({name.lower() for name in proxies}) < 2:
        what = f"openssl cannot connect with TLS where only {', '.join(proxies)} is set: set cmp_proxy, too"
    used = proxies and "proxy" not in options and host not in re.split(r"[,\s]+", excluded)
    yield used, f"{what}; set cmp_no_proxy if it should use none", WARNING


# The dry run. What openssl refuses, openssl says: it reads all options, opens the files and keys, and makes a request
# for nobody's key. It reads the answer from the null device, so nothing is sent, and nobody can add to what it says.
# handler_check() and `check` ask it; an enrolment only where its own run has ended before anything was sent.
NOBODYS_KEY = base64.b64decode("MDkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDIgADaxfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpY=")
FAULT_BELIEVED = 60  # seconds: somebody may repair what no file shows
_dry_runs: dict[object, tuple[float, list[str], list[str]]] = {}


def _dry_run(settings: Settings) -> Settings:
    """The settings, with what openssl says of them: asked once per process and state of options, secrets and files."""
    if settings.errors or "rspin" not in settings.binary.options:
        return settings
    asked, faults, expired = _dry_runs.get(settings.state, (0.0, None, []))
    if faults is None or (faults and abs(time.time() - asked) > FAULT_BELIEVED):
        faults, expired = _openssl_faults(settings)
        if faults is not None:
            _dry_runs[settings.state] = (time.time(), faults, expired)
    return settings._replace(errors=faults or (), warnings=[*settings.warnings, *expired])


def _openssl_faults(settings: Settings) -> tuple[list[str] | None, list[str]]:
    """What openssl says against the settings, with the entry that it is about, and which certificates have expired.

    None where it was killed: that says nothing about the settings.
    """
    run, made = _rehearse(settings)
    texts = list(dict.fromkeys(line.text for line in run.lines))
    expired = [f"openssl says: {_foreign(text, settings.hidden)}" for text in texts if EXPIRED_FILE.match(text)]
    faults = [text for text in texts if SKIPPED.search(text)]
    if run.killed() or (made and not faults):
        return None if run.killed() else [], expired
    if not faults:
        lines = [line for line in run.lines if not NOT_BEGUN.match(line.text)]
        faults = [line.text for line in lines if line.level == logging.ERROR or CAUSE.match(line.text)]
    said = _foreign("; ".join(dict.fromkeys(faults[:3])), settings.hidden) or "it cannot use that value"
    options, told = settings.options, "\n".join(faults)
    refusable = {o: v or "" for o, v in options.items() if o not in ("ref", "profile", "path")}  # these are any words
    values = [(v, o) for o, value in refusable.items() for v in _file_list(o, value) if len(v) > 1]
    values.sort(key=lambda one: -len(one[0]))  # a short value may be a part of a path
    named = [o for v, o in values if re.search(rf"(?<!\w){re.escape(v)}(?!\w)", told)]
    named = named or [o for o in options if re.search(rf"(^| )-{o}( |$)", told, re.M)]
    if not named:  # the one without which openssl makes a request
        named = next(([o] for o in options if _rehearse(settings, without=o)[1]), [])
    key = f"cmp_{named[0]}: " if named else "the configuration: "
    return [f"{key}openssl says: {said}{_hint(' '.join(texts))}"], expired


def _rehearse(settings: Settings, without: str = "") -> tuple[Run, bool]:
    """Run openssl without a server: how it ended, and whether it has made a request."""
    options = {option: value for option, value in settings.options.items() if option != without}
    # A wrong PIN costs one try of the token, and anybody's GET of the directory would be one: such keys are left out.
    for kind in ("", "tls_"):
        key = options.get(f"{kind}key") or ""
        if key and not os.path.isfile(key) and not key.startswith("file:"):
            left_out = (f"{kind}key", f"{kind}keypass", f"{kind}cert")
            options = {option: value for option, value in options.items() if option not in left_out}
            if not kind:
                options["unprotected_requests"] = None
    command = options.get("cmd") or "ir"
    options["cmd"] = {"p10cr": "ir", "rr": "genm"}.get(command, command)  # these two need more than the configuration
    _make_directory(settings)
    directory = f"{settings.directory}/{os.urandom(16).hex()}"
    os.mkdir(directory, 0o700)
    try:
        with open(f"{directory}/pubkey.pem", "w", encoding="ascii") as file:
            file.write(_pem(NOBODYS_KEY, "PUBLIC KEY"))
        request = ["-newkey", f"{directory}/pubkey.pem", "-subject", options.get("subject") or "/CN=check"]
        request += ["-certout", os.devnull, "-rspin", os.devnull, "-reqout", f"{directory}/request.der"]
        run = _run(_command(settings._replace(options=options), request), environment=settings.environment)
        return run, os.path.exists(f"{directory}/request.der")
    finally:
        _delete(directory)


# --- openssl ------------------------------------------------------------------------------------------------

MAX_OUTPUT = 1 << 18  # of openssl's messages
MAX_LOGGED = 400  # lines of one run of openssl in the log
MAX_TEXT = 300  # characters of an error: it becomes a log line and an ACME problem
GRACE = 5  # seconds that openssl may take beyond -total_timeout before it is killed
TICK = 0.2  # seconds between two looks at what openssl has saved, where it prints nothing
HUNG, ASLEEP, LOST = 256, 257, 258  # no exit codes: killed after its time, ended while it slept, nobody knows


class Binary(NamedTuple):
    """What an openssl program can do: `options` tells of each option of its `cmp` whether it takes a value."""

    path: str = ""
    version: str = "OpenSSL 9.9.9"  # where there is none: so no other fault is blamed on an old version
    options: Mapping[str, bool] = types.MappingProxyType({})
    spelled: Mapping[str, str] = types.MappingProxyType({})  # option -> how this program writes it
    mock_server: frozenset[str] = frozenset()  # its options that make a server of it
    fault: str = ""  # why it cannot serve an RA

    def margin(self) -> int:
        """The last seconds of -total_timeout, which openssl keeps for the answer to its last pollReq."""
        return 2 if self.since(3, 3) else 5

    def since(self, major: int, minor: int) -> bool:
        """Whether it is the release of this version of OpenSSL or a later one: since 3.0, -csr works with -cmd ir."""
        number = OPENSSL.match(self.version)
        return number is not None and (int(number[1]), int(number[2]), not number[3]) >= (major, minor, True)


def _binary(name: str) -> Binary:
    """What an openssl program can do. Raises CMPError where it cannot serve an RA."""
    path = shutil.which(name)
    if path is None and name == "openssl":
        raise CMPError("there is no openssl on the PATH of this process: set cmp_openssl_bin")
    if path is None:
        raise CMPError(f"cmp_openssl_bin: {_one_line(name, 100)} is not an executable program")
    if sys.platform == "win32" and path.lower().endswith((".bat", ".cmd")):
        # Windows has cmd.exe run it, and that reads the subject of a CSR as a part of its command line.
        raise CMPError(f"cmp_openssl_bin: {path} is a batch file: name openssl.exe itself")
    binary = _described(path, _file_state(path))
    if binary.fault:  # believed for a while, for each GET of the directory asks here
        binary = _described(path, (*_file_state(path), int(time.time() // FAULT_BELIEVED)))
    if binary.fault:
        raise CMPError(f"cmp_openssl_bin: {path} ({binary.version or 'unknown'}) {binary.fault}")
    return binary


@functools.lru_cache(maxsize=8)
def _described(path: str, state: tuple[int, ...]) -> Binary:
    """What a program says of itself: asked once per process, and again when the file has changed."""
    run = _run([path, "cmp", "-help"])
    about = _run([path, "version"]) if not run.killed() else run
    found = dict(OPTION.findall(run.output))
    if about.killed() or (found and about.code != 0):  # by a machine that is busy, or full: that is not remembered
        said = about.killed() or _one_line(about.output) or f"exit code {about.code}"
        raise CMPError(f"cmp_openssl_bin: {path}: {said}", UNREACHABLE)
    of_mock = dict(OPTION.findall("".join(MOCK_SERVER.findall(run.output))))
    # Our name for what cmpossl before 2020 writes without underscores, unless the program has one of that name, too.
    spelled = {option if (name := _option_name(option)) in found else name: option for option in found}
    options = {name: bool(found[option]) for name, option in spelled.items()}
    server = frozenset(name for name, option in spelled.items() if option in of_mock)
    said = _one_line("; ".join(line.text for line in run.lines if line.level != logging.INFO))
    if ONLY_PRIVATE_KEYS.search(run.output):
        fault = "takes only a private key for -newkey, and the ACME client's stays with the client: install OpenSSL 3"
    elif options.keys() >= {"cmd", "server"}:
        fault = ""
    elif run.code == 0 or not said or NO_COMMAND.search(said):
        fault = "has no cmp command: install OpenSSL 3"
    else:  # it cannot start: a broken openssl.cnf, a library that is missing
        fault = f"cannot run its cmp command: {said}: repair that, then restart acme2certifier"
    # The dynamic linker may have said something before it.
    version = next(filter(OPENSSL.match, about.output.splitlines()), about.output)
    binary = Binary(path, _one_line(version.partition("(")[0], 60), options, spelled, server, fault)
    if not binary.since(3, 0):  # it replays answers under another transactionID, so it cannot go on from them
        options.pop("rspin", None)
    return binary


@functools.lru_cache(maxsize=8)
def _object_names(program: str, version: str) -> dict[str, str]:
    """Each name of an object, also in small letters, and its number -> the short name that this openssl has for it."""
    run = _run([program, "list", "-objects"])
    if run.code != 0:  # half a list is not remembered
        raise CMPError(run.killed() or f"{program} cannot list the names of attributes: {_one_line(run.output)}")
    names: dict[str, str] = {}
    for spelled in (str, str.casefold):  # exactly first: `mail` and `Mail` are two
        for short, long, number in OBJECT.findall(run.output):
            for name in filter(None, (number, spelled(long), spelled(short))):
                names.setdefault(name, short)
    return names


def _option_name(option: str, known: Collection[str] = ()) -> str:
    """`option` under the name that this file, or else the openssl that has the options `known`, has for it.

    A name that is known exactly is kept: srvcert and the mock server's srv_cert are two. Only what nobody knows is
    looked up without its underscores, which cmpossl before 2020 often leaves out.
    """
    if option in OPTIONS or option in known:
        return option
    plain = option.replace("_", "")
    return next((name for name in (*OPTIONS, *known) if name.replace("_", "") == plain), option)


class Line(NamedTuple):
    """One line of openssl's, secrets included, and the level of logging that it has."""

    level: int
    text: str


class Run(NamedTuple):
    """How a program ended, and what it has said."""

    code: int  # or HUNG, ASLEEP, LOST
    output: str
    lines: Sequence[Line] = ()
    cut: bool = False  # it said more than is kept, or more than was read in time

    def errors(self) -> list[str]:
        """The texts of its errors, each once, but the one beside those of a poll, which says nothing by itself."""
        found = (line.text for line in self.lines if line.level == logging.ERROR)
        return [error for error in dict.fromkeys(found) if not POLLING_FAILED.match(error)]

    def complete(self) -> bool:
        """Whether it ended by itself, and all that it said is here: only then a missing line tells anything."""
        return 0 <= self.code < HUNG and not self.cut

    def only(self, lines: re.Pattern[str]) -> bool:
        """Whether it has said why it failed, and every line of that is one of these: see Exchange."""
        errors = self.errors()
        return self.complete() and bool(errors) and all(map(lines.match, errors))

    def killed(self) -> str:
        """How it was killed, or an empty string."""
        if self.code == HUNG:
            return "openssl did not end in time and was killed"
        if self.code == LOST:
            return "openssl's exit code was lost: something in this process waits for the children of others"
        return f"openssl was killed by signal {-self.code}" if self.code < 0 else ""


def _run(
    argv: Sequence[str],
    limit: float = 10,
    environment: Mapping[str, str] | None = None,
    keep: Sequence[int] = (),
    asleep: Callable[[], bool] = lambda: False,
) -> Run:
    """Run a program and collect what it says; kill it, with its process group, after `limit` seconds.

    It gets this `environment`, or ours, and inherits the file descriptors `keep`. `asleep` is asked from time to
    time while the program says nothing: where it says yes, the program is ended as well.
    """
    if sys.platform != "win32" and signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        raise CMPError("this process ignores SIGCHLD, so nobody can know how openssl ends: use another web server")
    output, chunk, ended, deadline = b"", b"-", False, time.monotonic() + limit
    try:
        process, job = _start(argv, environment, keep)
    except (OSError, ValueError) as err:
        number = getattr(err, "errno", None) or 0
        kind = DISK if number in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM) else CONFIGURATION
        what = f"cannot run {argv[0]}: {getattr(err, 'strerror', None) or err}"
        raise CMPError(what + _hint(errno.errorcode.get(number, "")), kind) from err
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    with process.stdout as pipe:
        try:
            # Reading to the end of the pipe, then waiting, costs less than subprocess's own timeout does.
            while chunk and not ended and time.monotonic() < deadline:
                if _readable(pipe, TICK):
                    chunk = os.read(pipe.fileno(), 65536)
                    output = (output + chunk)[: MAX_OUTPUT + 1]
                else:
                    ended = asleep()
            tries = 0
            while not ended and _exit_code(process) is None and time.monotonic() < deadline:
                tries += 1  # it has closed its output, so it ends at once; or else it is a strange program
                time.sleep(0 if tries < 100 else 0.01)
        finally:
            code = _exit_code(process)
            _kill(process, job)
    text = output[:MAX_OUTPUT].decode("utf-8", "replace").replace("\r\n", "\n")  # as programs for Windows end them
    # If it has ended by itself meanwhile, its last words were not read: that is no complete run either.
    code = HUNG if code is None else code
    return Run(ASLEEP if ended else code, text, _lines(text), cut=bool(chunk) or len(output) > MAX_OUTPUT)


def _lines(output: str) -> list[Line]:
    """openssl's lines. What is no message of its log (a certificate's details, say) gets the level debug."""
    lines: list[Line] = []
    for line in filter(None, output.split("\n")):
        match = MESSAGE.match(line)
        name, text = match.groups() if match else ("debug", QUEUE.sub(lambda found: f"{found[1]} {found[2]}", line))
        text = text.strip()
        if text:
            level = logging.ERROR if text.startswith(OTHER_SENDER) else LEVELS.get(name.lower(), logging.ERROR)
            lines.append(Line(level, text))
    return lines


def _log_messages(logger: logging.Logger, run: Run, settings: Settings, usual: str = "") -> None:
    """Hand openssl's lines to the log, each at its own level, but what is `usual` at the lowest.

    Whole lines are masked: the CA knows the shared secret, and may write it into any text.
    """
    lines = run.lines
    if len(lines) > MAX_LOGGED:  # a stranger's certificate may hold any number of lines
        logger.warning("openssl cmp: %s of its %s lines left out", len(lines) - MAX_LOGGED, len(lines))
        lines = [*lines[: MAX_LOGGED // 2], *lines[-MAX_LOGGED // 2 :]]
    for line, text in zip(lines, _hide("\n".join(line.text for line in lines), settings.hidden).split("\n")):
        expected = ONE_WAY_TLS.match(line.text) or (usual and re.match(usual, line.text, re.I))
        level = logging.DEBUG if expected else line.level
        if logger.isEnabledFor(level):
            logger.log(level, "openssl cmp: %s", _one_line(text, 2 * MAX_TEXT))


def _foreign(text: str, secrets: Collection[str], limit: int = MAX_TEXT) -> str:
    """Somebody else's text for a log line or an error: secrets masked, on one line, and only then cut."""
    return _one_line(_hide(text, secrets), limit)


def _hide(text: str, hidden: Iterable[str]) -> str:
    """`text`, which is not ours, without what is hidden (see `_hidden`), and without what looks like a secret."""
    for spelled in hidden:
        text = text.replace(spelled, "***")
    # The PIN of a token, the password of a proxy.
    pin = r"(?i)((?:\b|_)(?:pin(?:-value)?|pass(?:word|phrase)?|secret)) *= *[^;&?\s'\"]+"
    return re.sub(r"//[^/@\s'\"]+@", "//***@", re.sub(pin, lambda found: f"{found[1]}=***", text))


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


def _hint(searched: str) -> str:
    """The first hint that fits, in brackets, or an empty string."""
    pairs = (line.split(" -> ") for line in HINTS.strip().splitlines())
    return next((f" ({hint})" for words, hint in pairs if re.search(words, searched, re.I)), "")


# What differs between operating systems, and the disk


def _default_directory() -> str:
    """Where transactions live if cmp_tmp_dir does not say: a directory of this user's."""
    import tempfile  # takes longer to import than this file does

    user = re.sub(r"\W", "-", os.environ.get("USERNAME", "")) if sys.platform == "win32" else str(os.getuid())
    return os.path.join(tempfile.gettempdir(), f"cmp_ca_handler-{user}")


def _directory_fault(path: str, own: bool) -> str:
    """Why cmp_tmp_dir cannot be used, or an empty string; `own` is the default directory. Makes nothing."""
    name = _one_line(path, 100)
    if re.search(r"[\s,\\\0]", path):
        return f"cmp_tmp_dir {name}: openssl cannot use a name with a blank, a comma or a backslash"
    way = dict(_way(path))
    links = [place for place, info in way.items() if info and stat.S_ISLNK(info.st_mode)]
    real = os.path.realpath(path) if links or sys.platform == "win32" else path
    if own and path in links:
        return f"cmp_tmp_dir {path} is a symbolic link: set cmp_tmp_dir to a directory of your own"
    upwards = way if real == path else dict(_way(real))
    # What is missing will be made, if its parent lets us.
    there, mode = next(((place, info.st_mode) for place, info in upwards.items() if info), (real, 0))
    try:
        os.lstat(real)
    except OSError as err:
        if err.errno not in (errno.ENOENT, errno.ENOTDIR):  # a shared disk that is away
            return f"cmp_tmp_dir: {_explained(err)[1]}"
    if not stat.S_ISDIR(mode):
        return f"cmp_tmp_dir {_one_line(there, 100)} is not a directory"
    # Whoever can rename our directories, or those above, can put another public key into a request.
    for place, info in {**way, **upwards}.items():
        who = _writable_by_others(info)
        if who:
            return f"cmp_tmp_dir: {_one_line(place, 100)} {who}"
    if there == real and os.name == "posix" and mode & 0o1002 == 0o1002:
        return f"cmp_tmp_dir {name}: every local user can put something there: name a directory of your own in it"
    if os.access(there, os.W_OK | os.X_OK):
        return ""
    if os.name == "posix" and os.statvfs(there).f_flag & os.ST_RDONLY:
        return f"cmp_tmp_dir {name} is on a file system that cannot be written now: look into the system's log"
    return f"cmp_tmp_dir {name} cannot be written by {_user()}: install -d -o {_user()} -m 700 {name}"


def _way(path: str, depth: int = 0) -> Iterator[tuple[str, os.stat_result | None]]:
    """The directory, those above it, and the same for each symbolic link on the way: all that can lead us elsewhere.

    And what the system says of each, None where it is not there.
    """
    here, below = os.path.abspath(path), ""
    while here != below:  # what is above the root is the root
        info = _about_file(here)
        yield here, info
        if info and stat.S_ISLNK(info.st_mode) and depth < 40:
            yield from _way(os.path.join(os.path.dirname(here), os.readlink(here)), depth + 1)
        here, below = os.path.dirname(here), here


def _about_file(path: str) -> os.stat_result | None:
    """What the system says of a file, a directory or a link, None where there is none."""
    try:
        return os.lstat(path)
    except OSError:
        return None


def _make_directory(settings: Settings) -> None:
    """Make cmp_tmp_dir, if it is not there. The directories above it are nobody else's either. Raises CMPError."""
    if os.path.isdir(settings.directory):
        return
    for path in reversed([path for path, _ in _way(settings.directory) if not os.path.isdir(path)]):
        with contextlib.suppress(FileExistsError):  # somebody may have been quicker
            os.mkdir(path, 0o700)
        with contextlib.suppress(OSError):  # who may write into a directory need not be allowed to open it
            _sync(os.path.dirname(path))
    fault = _directory_fault(settings.directory, settings.own_directory)
    if fault:
        raise CMPError(fault)


def _openssl_path(path: str) -> str:
    """`path` as openssl takes it in a list of files: a backslash quotes there."""
    return path.replace("\\", "/") if os.sep == "\\" else path


def _writable_by_others(info: os.stat_result | None) -> str:
    """Who else may change this directory or link, as the end of an error, or nothing. Windows tells only by ACLs."""
    if sys.platform == "win32" or info is None:  # it will be made
        return ""
    if info.st_uid not in (os.geteuid(), 0):
        ours = "give it to the user of acme2certifier; machines that share it need the same uid number"
        what = f"run this as {_user(info.st_uid)}" if os.geteuid() == 0 else ours
        return f"belongs to another user: {what}"
    if stat.S_ISDIR(info.st_mode) and info.st_mode & 0o002 and not info.st_mode & 0o1000:
        return "can be written by every local user: chmod o-w"
    return ""


def _user(number: int | None = None) -> str:
    """The name of a user, or of the one who runs this process."""
    if sys.platform == "win32":
        return os.environ.get("USERNAME", "this user")
    import pwd  # only for an error

    number = os.geteuid() if number is None else number
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(number).pw_name
    return f"user {number}"


def _check_room(path: str) -> None:
    """Raise OSError where there is no room for the CA's answers: blocks and inodes."""
    if sys.platform == "win32":
        full = shutil.disk_usage(path).free < MAX_DER
    else:
        disk = os.statvfs(path)
        full = disk.f_bavail * disk.f_frsize < MAX_DER or (disk.f_files > 0 and disk.f_favail < 8)
    if full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


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
    """A descriptor of a lock file that we hold, until we and openssl end. Raises BlockingIOError if another does."""
    lock = _open_lock(path, new)
    try:
        if sys.platform == "win32":
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(lock)
        if sys.platform == "win32":
            raise BlockingIOError from err
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
        lock = msvcrt.open_osfhandle(handle, os.O_RDWR)
    else:
        low = os.open(path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if new else 0), 0o600)
        try:  # where standard input is closed it may be number 0, which openssl gets another file as
            lock = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 3)
        finally:
            os.close(low)
    return lock


def _unlock(descriptor: int) -> None:
    """Let go of the lock, for all who have inherited it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # when acme2certifier's process forked
    finally:
        os.close(descriptor)


def _start(
    argv: Sequence[str], environment: Mapping[str, str] | None, keep: Sequence[int]
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a program that reads nothing, with this environment, or ours; it inherits `keep`, if it can.

    It and all that it starts are a process group, or on Windows a job, whose handle comes second.
    """
    # Not DEVNULL: where the pipe cannot be made, older Pythons (Debian 12's) leave its descriptor open.
    with open(os.devnull, "rb", buffering=0) as null:
        streams: dict[str, Any] = {"stdin": null, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        if sys.platform == "win32":
            environment = {**(environment or os.environ), "OPENSSL_WIN32_UTF8": "1"}  # else it reads arguments as ANSI
            argv, flags = [os.path.abspath(argv[0]), *argv[1:]], subprocess.CREATE_NO_WINDOW
            process = subprocess.Popen(argv, env=environment, creationflags=flags, **streams)
            # No lock can be inherited. Instead, what is in the job ends when this process does.
            job: int = _kernel32.CreateJobObjectW(None, None)
            limits = ctypes.create_string_buffer(144 if sys.maxsize > 1 << 32 else 112)
            limits[17] = b"\x20"  # JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
            _kernel32.SetInformationJobObject(job, 9, limits, len(limits))
            _kernel32.AssignProcessToJobObject(job, int(process._handle))  # type: ignore[attr-defined]
            return process, job
        return subprocess.Popen(argv, env=environment, pass_fds=keep, start_new_session=True, **streams), 0


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
    if not hasattr(select, "poll"):  # eventlet takes it away
        return bool(select.select([pipe], [], [], seconds)[0])
    poller = select.poll()
    poller.register(pipe, select.POLLIN | select.POLLHUP)
    return bool(poller.poll(seconds * 1000))


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code, None while it runs. Popen.poll() says 0 where the status is lost, and 0 would be a yes."""
    if sys.platform == "win32" or process.returncode is not None:
        return process.poll()
    try:
        pid, status = os.waitpid(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status) if pid else None
    except ChildProcessError:
        process.returncode = LOST
    return process.returncode


def _kill(process: subprocess.Popen[bytes], job: int) -> None:
    """End what still runs of it."""
    if sys.platform == "win32":
        _kernel32.CloseHandle(job)
        process.kill()
    elif process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# openssl's words: all texts of openssl that this file looks for. Where a new version has other words for one of them,
# tests fail with it, and this is the place to change.

# Its levels; all others are errors. cmpossl of 2019 has them in capitals.
LEVELS = {"warning": logging.WARNING, "note": logging.INFO, "info": logging.INFO}
LEVELS.update({"debug": logging.DEBUG, "trace": logging.DEBUG})
MESSAGE = re.compile(r"^(?:[\w./:-]*:)?CMP (fatal|alert|critical|error|warning|note|info|debug|trace): ?(.*)$", re.I)
QUEUE = re.compile(r"^[0-9A-F]+:error:[^:]*:[^:]*:[^:]*:([^:]*):[^:]*:\d+:(.*)$")  # openssl's error queue, as printed

# Error lines that openssl prints only after it has accepted the newest message.
ACCEPTED_LINE = re.compile(
    r"received error(?!:code=)|unexpected pkistatus|unknown pkistatus|error parsing pkistatus"
    '|received "rejection" status|request rejected by server|received unsupported PKIStatus|unexpected pkibody'
    "|encountered keyupdatewarning|certificate not found|certresponse not found|multiple responses"
    "|Did not receive response|bad request id|missing private key",
    re.I,
)
# The same, about a certificate that openssl does not look at: the answer has another certReqId, or is more than one.
NOT_THE_ANSWER = re.compile("certresponse not found|multiple responses|bad request id", re.I)
# The same, about a certificate that the CA has issued, but openssl does not take: another key, or cmp_out_trusted.
LEAF_NOT_ACCEPTED = re.compile("certificate not accepted")
AFTER_ACCEPTANCE = re.compile(
    f"{ACCEPTED_LINE.pattern}|{LEAF_NOT_ACCEPTED.pattern}|failed to validate newly enrolled|rejecting newly enrolled"
    "|different key types|key type mismatch|key values mismatch|certificate verification failed",
    re.I,
)
TIME_WORDS = "total timeout"
# Lines that say no more than that the CA lets us wait, and the time is up, or the file of one request more cannot be
# written. They are anchored: a sender may be called "total timeout", too.
TIME_IS_UP = re.compile(
    rf"{TIME_WORDS}|cannot write PKIMessage to file '[^']*/({NO_MORE_REQUESTS}|\d+\.req)'$|no such file$"
    rf"|[^:]{{0,60}}:calling fopen\([^ ]*/({NO_MORE_REQUESTS}|\d+\.req), wb\)$"
    "|transfer error:request sent: (POLLREQ|CERTCONF), expected response: (POLLREP|PKICONF)$",
    re.I,
)
# Lines about a pollRep that openssl has accepted, but cannot wait as long as, or as short as, it says; and about a
# certificate that it has accepted, but cannot confirm, for its signature has no hash (Ed448).
TAKEN = re.compile(
    f"{TIME_WORDS}|checkafter out of range|bad checkafter in pollrep|too (large|small)$"
    "|error creating certconf|unknown sigid algs|decode error$",
    re.I,
)
# A sender that is not cmp_expect_sender: OpenSSL 3.0 calls that no error.
OTHER_SENDER = "does not match expected sender"
POLLING_FAILED = re.compile("polling failed")
# The end of a run that only has to see what was saved, or of one that the CA lets wait: no errors for the log.
END_OF_REPLAY, END_OF_WAIT = "-server option|too few -rspin", f"{TIME_IS_UP.pattern}|{POLLING_FAILED.pattern}"
CONNECT_TIMEOUT = re.compile("connect timeout")
SENT = re.compile("sending [A-Z]|transfer error:request sent")
SENDING, SAYS_SENDING = re.compile("sending [A-Z0-9]+$"), 6  # and the verbosity from which on it says so
# The first error about a certificate that does not verify, and the one about that of a TLS server, which comes later.
OF_THE_SIGNER = re.compile("error validating protection")
CERTIFICATE_REFUSED, TLS_REFUSED = re.compile("certificate verification failed"), "certificate verify failed"
OUT_OF_DATE = re.compile(r"^cert has expired$|^cert not yet valid$|depth = \d+ error = (?:9|10|6[678]) \([A-Za-z ]+\)$")
# EJBCA's, in its refusals.
CA_WORDS = re.compile(
    "approval|'COMMONNAME' must exist|Wrong number of [^.]{1,60} fields|not contain matching field", re.I
)
NOT_PROTECTED, NO_MAC = re.compile("missing protection"), re.compile("missing trust|no suitable sender")
UNMATCHED = re.compile("(transactionid|recipnonce) unmatched")
NO_SIGNER, SRVCERT_REFUSED = re.compile("no suitable sender cert"), "srvcert does not validate"
# What an HTTP server, or the signer's name, may say is not searched for hints, or they would be their choice.
FOREIGN_WORDS = re.compile(r"(reason= ?(?:\d{3}\b)?|actual=|content=|input=|Content-Type: | name = |:/(?=[\w.]+=)).*")
# The first error where openssl has not even begun. Then the cause is no message of its log, but a line like these.
NOT_BEGUN = re.compile("cannot set up cmp context|error creating certreq", re.I)
CAUSE = re.compile(
    "(?!.*(config file|PKIMessage from file|-tls_used given without)).*"
    "(error|unable|could not|cannot|can't|unknown|invalid|negative|no |not match|incorrect|not found)",
    re.I,
)
# Of a dry run: what openssl passes over, almost in silence.
SKIPPED = re.compile("Skipping unknown .* attribute|No value provided for .* attribute", re.I)
EXPIRED_FILE = re.compile("Warning: certificate from ")
# OpenSSL 3.5 and later warn of it at each run, though TLS without a client certificate is nothing unusual.
ONE_WAY_TLS = re.compile("-tls_used given without -tls_key;")
# For `check --connect` and `cacerts`.
TLS_FAILED = re.compile(f"error sending|connect|timeout|{TIME_WORDS}|certificate verif|handshake|alert", re.I)
WILL_CONTACT = re.compile("will contact (.*)", re.I)
NO_ANSWER_TO_GENM = re.compile("Did not receive response")
NO_CA_CERTS = re.compile("does not include suitable value")
# A certificate that OpenSSL marks as invalid: a keyUsage without a bit, an extension twice, a broken one.
INVALID_CERTIFICATE, INVALID_FOR_ALL_PURPOSES = re.compile("invalid certificate"), "WARNING code=-1"
# For other commands than cmp.
SIGNATURE_FITS = re.compile(r"^(Certificate request self-signature )?verify OK$", re.M)
SIGNATURE_WRONG = re.compile("verify failure")
FALSE_SIGNER = re.compile("lookup: *(.*)")
NO_COMMAND = re.compile("invalid command", re.I)
OPTION = re.compile(r"^ -([\w-]+)(?: (\S+))?(?:  .*)?$", re.M)  # a value's type stands one blank behind the name
OBJECT = re.compile(r"^([\w.-]+) = (?:(.*), )?(\d+(?:\.\d+)+)$", re.M)  # short name, perhaps the long one, number
MOCK_SERVER = re.compile("^Mock server options:\n(.*?)(?:\n\n|\\Z)", re.M | re.S)
OPENSSL = re.compile(r"OpenSSL (\d+)\.(\d+)\.\d+(-(?:alpha|beta|dev|pre))?")
ONLY_PRIVATE_KEYS = re.compile(r"^ -newkey \S+ +Private key", re.M)

# What openssl, the CA, this file or, by a name such as ENOSPC, the system says (a regular expression) -> what to do.
# The first one that fits counts, so special ones come first. Nothing is decided by them.
# A test holds docs/troubleshooting.md to the same list.
HINTS = r"""
approval -> the CA queues what needs an approval, and no poll sees it: approve it there, or switch approvals off
'COMMONNAME' must exist -> set cmp_subject, such as CN=acme
Wrong number of .* fields|not contain matching field -> add fields for more names to the CA's end entity profile
failed building own chain -> cmp_own_trusted must hold the root of cmp_cert, cmp_untrusted its intermediates
error = (9|10) .cert|cert has expired|cert not yet valid -> that certificate is out of date: renew it, or set the clock
error = 6[234] . -> the certificate is not for cmp_tls_host, cmp_verify_hostname, cmp_verify_email or cmp_verify_ip
error = 26 . -> the certificate is not for that purpose: look at cmp_purpose, or at its extended key usage
certificate CRL -> delete cmp_crl_check: openssl cmp can be given no CRL
error = 6[678] . -> that certificate has a key or a signature that is too weak for OpenSSL: renew it
certificate verify failed -> cmp_tls_trusted must hold the issuer of the TLS certificate, cmp_tls_host its name
failed to validate newly enrolled -> cmp_out_trusted must hold the root, cmp_untrusted the issuers of certificates
error creating certconf -> openssl cannot confirm such a certificate: cmp_disable_confirm: True, if the CA allows that
does not match the TLS certificate -> cmp_tls_key does not belong to cmp_tls_cert
TLS client private key -> check cmp_tls_key and cmp_tls_keypass, and for a token its name, the PIN and the module
wrong pbm value -> the shared secret does not fit: check cmp_ref and cmp_secret
answers are not protected -> let the CA protect its yes; for the last message set cmp_implicit_confirm: True
another kind of MAC -> openssl cmp knows PasswordBasedMac, not PBMAC1: change that at the CA
the request was not read -> the CA cannot read the request, so it answers to none: its own words are the reason
missing protection -> read what the answer says; many CAs answer so if they refuse cmp_cert, cmp_secret or cmp_recipient
unable to get local issuer certificate -> cmp_trusted must hold the CMP server's root, cmp_untrusted its intermediates
unable to get issuer certificate -> cmp_trusted holds an intermediate: add its root, or cmp_partial_chain: True
self-signed certificate -> cmp_trusted must hold the CA's own root certificate
missing key usage digitalSignature -> set cmp_ignore_keyusage: True if the CA's signer is like that
Error adding .* name attribute -> a country has two letters, a CN 64 at most; DC and e-mail are ASCII
expected sender -> cmp_expect_sender does not fit the sender of the answer, or cmp_srvcert is another certificate
request extension section -> set cmp_config to the OpenSSL configuration file that has this section
srvcert does not validate -> cmp_srvcert is not the certificate that signs the CA's answers
missing trust -> the answer is signed: set cmp_trusted to its root and cmp_expect_sender, beside a secret, too
no suitable sender cert -> the answer has no certificate of its sender: name it in cmp_untrusted, or pin it: cmp_srvcert
invalid padding|bad signature -> the answer is not signed by the certificate that its sender names
iterationcount -> openssl takes 100 to 100,000 iterations of PasswordBasedMac: change that at the CA
recipnonce unmatched -> a recorded answer, a delay that needs OpenSSL 3.5 (RFC 9483, 4.4), or an old copy of cmp_tmp_dir
transactionid unmatched -> the answer is of another transaction: does something on the way mix up answers?
unexpected pvno -> the CA speaks another version of CMP than openssl (3.0: 2; 3.5: 2 and 3): ask for another cmp_path
checkafter -> the CA gives no usable number of seconds after which to ask again: ask its operator
connect timeout -> nothing answers there: check cmp_server, cmp_proxy, DNS, the firewall, and that the CMP service runs
transfer timeout -> no answer in time: the CA is slow (raise cmp_msg_timeout) or it is no CMP server
(code=|http code |reason= ?)(401|407) -> the web server or proxy wants a password, which openssl cmp cannot send
(code=|http code |reason= ?)403 -> the web server does not let this machine in: check cmp_path and cmp_tls_cert
(code=|http code )404 -> no CMP service under this path: check cmp_path
(code=|http code )413 -> the web server takes no request of this size (nginx: client_max_body_size)
(code=|http code )429 -> too many requests: the server, or a proxy on the way, limits their number
(code=|http code )500 -> the server failed: look into its log
(code=|http code )(405|501) -> a web server that takes no CMP requests: check cmp_server and cmp_path
(code=|http code )50[234]|connect failure -> a proxy on the way cannot reach the CMP server, or the server is busy
(code=|http code )30\d|redirection not enabled -> the server redirects: set cmp_server and cmp_path to the final address
(code=|http code )400 -> the server expects TLS (cmp_tls_used: True) or a cmp_tls_cert, or cmp_path is wrong
(code=|http code )([145]\d\d|20[1-9]) -> the web server does not hand the request to a CMP service: see its log
missing content type -> an HTTP error without a text (3.5 does not say which: look into the server's log), or no CMP
unexpected content type|content type mismatch -> an HTTP error, or no CMP: check cmp_path; it has no charset
header parse error -> that is no HTTP server: check cmp_server, and cmp_tls_used if it expects TLS
wrong version number -> the server does not speak TLS on this port: check cmp_server and cmp_tls_used
unrecognized name -> the TLS server has no such name: check cmp_server and cmp_tls_host
protocol version|unsupported protocol|legacy renegotiation|legacy sigalg -> the server's TLS is too old for this OpenSSL
failed reading data|error sending -> the connection was closed: check cmp_tls_used, cmp_tls_cert, and the CA's log
max resp len exceeded|nested asn1 error|missing asn1 encoding -> a broken answer, or no CMP: check cmp_server, cmp_path
does not match our enrollment key -> the CA issued for another key: look into the CA's log
badMessageCheck -> the CA could not verify the request: check cmp_ref and cmp_secret, or cmp_cert and cmp_key
wrongIntegrity -> the CA wants the other kind of credentials: cmp_cert and cmp_key, or cmp_ref and cmp_secret
signerNotTrusted -> register cmp_cert at the CA, and send its intermediates (cmp_extracerts)
notAuthorized -> the CA does not let this RA do that: check the RA's rights at the CA
badPOP -> let the CA accept raVerified from this RA; or cmp_cmd: p10cr, where the CA takes CSRs as they are
badCertTemplate -> the CA refuses the subject, a name or an extension: compare with its profile, or set cmp_profile
unacceptedExtension -> let the client ask for less, or change the CA's profile
badAlg -> try cmp_digest: sha256, with a secret cmp_mac: hmacWithSHA256 too, else cmp_cert
badTime -> the clocks of this machine and of the CA differ: set them
badDataFormat -> the CA cannot read the request: check cmp_path, then look into the CA's log
badRecipientNonce|badSenderNonce -> an answer got lost, or an old copy of cmp_tmp_dir was used: order again
transactionIdInUse -> the CA has got this request twice (a proxy?): order the certificate again
duplicateCertReq -> the CA has such a request or certificate already: finish it there, or make a new key
systemUnavail|systemFailure -> the CA cannot work now: ask its operator, and try again later
PKIStatus: waiting -> OpenSSL understands that for an enrolment only, and before 3.3 not in each answer
wrongAuthority -> check cmp_recipient and cmp_issuer
cert and key do not match|key values mismatch -> cmp_key does not belong to cmp_cert
unsupported key type -> this openssl cannot sign with such a key (Ed25519 needs OpenSSL 3.5): use RSA or EC
cannot use the CSR -> the CSR is damaged, or its key is newer than this openssl (ML-DSA needs OpenSSL 3.5)
TLS client certificate.*pkcs12 mac -> the pass phrase does not fit the file: check cmp_tls_keypass
bad decrypt|CMP client certificate.*pkcs12 mac -> the pass phrase does not fit the key: check cmp_keypass
pkcs12 mac -> the pass phrase does not fit that PKCS #12 file: make it PEM, or check cmp_otherpass
PIN incorrect -> check cmp_keypass, or the pin-source in cmp_key: a token locks itself after a few wrong PINs
object not found|could not (find|read|open).*private key -> check cmp_key, and for a token its name, the PIN, the module
digest algorithm name not recognized -> openssl calls them sha256, sha384, sha512
MAC algorithm name not recognized -> openssl calls them hmac-sha1, hmacWithSHA256
must give -ref -> set cmp_ref: without it nothing but enrolments is possible
must give -key or -secret -> no credentials: set cmp_ref and cmp_secret, or cmp_cert and cmp_key
No space left on device|\bENOSPC$ -> make room on the disk of cmp_tmp_dir
\bEDQUOT$ -> the quota of this user on the disk of cmp_tmp_dir is used up
\bE[MN]FILE$ -> raise the limit of open files, of this process or of the system
\bEROFS$ -> cmp_tmp_dir must be on a file system that can be written
\bENOLCK$ -> the file system of cmp_tmp_dir must support flock
\bE(NOTCONN|BADFD)$ -> the file system of cmp_tmp_dir cannot be reached now
\bEIO$ -> the disk of cmp_tmp_dir fails, or the machine that it is mounted from cannot be reached now
\bEACCES$ -> check owner and mode of cmp_tmp_dir; machines that share it need the same uid number
"""

# --- Reading: DER, names, certificates, CMP messages -------------------------------------------------------------

# A few lines that read tags, lengths and names; openssl verifies.

SUBJECT_KEY_ID, AUTHORITY_KEY_ID = "2.5.29.14", "2.5.29.35"
UNREADABLE = "unreadable"  # in place of a certificate's extensions
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
SLASH_ESCAPES = str.maketrans({sign: f"\\{sign}" for sign in r"\/+="})
DN_TYPES = {**{short.upper(): short for short, _, _ in ATTRIBUTES.values()}, **DN_ALIASES}
STRINGS = {UTF8: "utf-8", PRINTABLE: "ascii", IA5: "ascii", 0x12: "ascii", 0x1A: "ascii", 0x14: "latin-1"}
STRINGS.update({0x1E: "utf-16-be", 0x1C: "utf-32-be"})
MAX_DER = 1 << 17  # no CSR or certificate is larger, even with post-quantum signatures; openssl's limit is 100 kB
MAX_KEPT = 1 << 12  # of a certificate that is read once for all
MALFORMED = (CMPError, LookupError, ValueError, StopIteration)  # what reading raises


class Element(NamedTuple):
    """One DER element: tag, contents, and the whole encoding."""

    tag: int
    value: bytes
    raw: bytes


def _elements(data: bytes, strict: bool = False) -> Iterator[Element]:
    """The DER elements that `data` consists of. Raises CMPError where it is not DER.

    A length with more octets than it needs is BER, and let pass unless `strict`.
    """
    start, size = 0, len(data)
    while start < size:
        tag, length, begin = data[start], data[start + 1] if start + 1 < size else 0x80, start + 2
        if tag & 0x1F == 0x1F or length == 0x80 or length > 0x84:  # 0x80 is the indefinite form of BER
            raise CMPError("malformed DER")
        if length > 0x80:
            begin += length - 0x80
            length = int.from_bytes(data[start + 2 : begin], "big")
            if strict and (length < 0x80 or not data[start + 2]):
                raise CMPError("a length in it is BER, not DER")
        end = begin + length
        if end > size:
            raise CMPError("DER cut short")
        yield Element(tag, data[begin:end], data[start:end])
        start = end


def _sequence(data: bytes) -> list[Element]:
    """The elements in the one SEQUENCE that `data` is."""
    outer = list(_elements(data))
    if len(outer) != 1:
        raise CMPError("not one DER sequence")
    return _members(outer[0])


def _members(sequence: Element) -> list[Element]:
    """The elements in a SEQUENCE."""
    if sequence.tag != 0x30:
        raise CMPError("not one DER sequence")
    return list(_elements(sequence.value))


def _by_tag(elements: Iterable[Element]) -> dict[int, bytes]:
    """The contents of elements, each of which may be there or not: of two with one tag, the first counts."""
    return {element.tag: element.value for element in reversed([*elements])}


def _check_der(data: bytes, depth: int = 0) -> None:
    """Raise CMPError unless `data` is DER all the way down (X.690, 10): of BER, two programs read two things."""
    for tag, value, _ in _elements(data, strict=True):
        constructed = bool(tag & 0x20)
        if tag < 0x40 and constructed != (tag & 0x1F in (0x10, 0x11)):
            raise CMPError(f"tag {tag:#04x} in it is BER, not DER")
        if depth > 20:
            raise CMPError("it is nested too deeply")
        if constructed:
            _check_der(value, depth + 1)
        elif tag == 0x06 and (not _oid(value) or re.search(rb"(^|[\x00-\x7f])\x80", value, re.S)):
            raise CMPError("an object identifier in it is not DER")


@functools.lru_cache(maxsize=256)
def _oid(value: bytes) -> str:
    """An object identifier in dotted form."""
    numbers, number = [], 0
    for octet in value if len(value) < 64 else b"":  # no real one is longer, and the numbers would be huge
        number = number << 7 | octet & 0x7F
        if not octet & 0x80:
            numbers.append(number)
            number = 0
    if not numbers or value[-1] & 0x80:
        return ""
    first = min(numbers[0] // 40, 2)
    return ".".join(str(n) for n in [first, numbers[0] - 40 * first, *numbers[1:]])


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
            kind, value = _members(pair)[:2]
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
        frozenset((a.type, " ".join((a.text or a.raw.decode("latin-1")).casefold().split())) for a in rdn)
        for rdn in name
    )


def _name_text(name: Name) -> str:
    """A name for people, in RFC 4514's notation but in the order of the certificate."""
    rdns = []
    for rdn in name:
        values = ["#" + a.raw.hex() if a.text is None else _escaped(a.text) for a in rdn]
        kinds = [ATTRIBUTES[a.type][0] if a.type in ATTRIBUTES else a.type for a in rdn]
        rdns.append("+".join(map("=".join, zip(kinds, values))))
    return _one_line(", ".join(rdns)) or "(empty)"


def _escaped(text: str) -> str:
    """An attribute's value in RFC 4514's notation; a blank at its end would be stripped, with a backslash, too."""
    special = r"^ | $|(^|(?<=\s))#|[,+\"\\;<>=]"  # behind a blank a # begins a comment
    return re.sub(special, lambda found: r"\20" if found[0] == " " else "\\" + found[0], text)


def _slash_form(name: Name, exact: bool) -> str | None:
    """`name` for `-subject`, None where that cannot carry it, or, with `exact`, not to the very same bytes."""
    text = ""
    for rdn in name:
        if exact and len(rdn) != 1:  # openssl would sort its attributes
            return None
        for position, a in enumerate(rdn):
            if a.type not in ATTRIBUTES or not a.text or not a.text.isprintable():
                return None
            short, tag, longest = ATTRIBUTES[a.type]
            if len(a.text) > longest or (exact and a.tag != tag) or (short == "C" and len(a.text) != longest):
                return None
            text += ("+" if position else "/") + short + "=" + a.text.translate(SLASH_ESCAPES)
    return _utf8(text)


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
    issuer_id: object  # to compare names by
    subject_id: object
    extensions: dict[str, bytes]
    subject_key: bytes  # identifier of its key
    authority_key: bytes  # of the key that has signed it

    def valid(self) -> bool:
        """Whether it is valid now."""
        return self.not_before <= _iso(time.time()) <= self.not_after


def _iso(seconds: float) -> str:
    """A time as ISO 8601 has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _time(element: Element) -> str:
    """UTCTime or GeneralizedTime (RFC 5280, 4.1.2.5) as ISO 8601 has it."""
    text = element.value.decode("ascii", "replace")
    if element.tag == 0x17:  # two digits of the year: 50 is 1950
        text = ("19" if text[:2] >= "50" else "20") + text
    return _one_line(re.sub(r"^(....)(..)(..)(..)(..)(..)", r"\1-\2-\3T\4:\5:\6", text), 40)


def _certificate(der: bytes) -> Certificate:
    """Read a certificate (RFC 5280, 4.1). Raises CMPError where it is none."""
    # An issuer comes again with each leaf. What is large is not kept: strangers can send it.
    return (_read_certificate if len(der) <= MAX_KEPT else _read_certificate.__wrapped__)(der)


@functools.lru_cache(maxsize=16)
def _read_certificate(der: bytes) -> Certificate:
    try:
        fields = [field for field in _members(_sequence(der)[0]) if field.tag != 0xA0]  # without the version
        number, algorithm, issuer, validity, subject, key = fields[:6]
        serial = _one_line(f"{int.from_bytes(number.value, 'big', signed=True):x}", 64)
        start, end = map(_time, _members(validity))
        names = _name(issuer.raw), _name(subject.raw)
        about = (serial, algorithm.raw, names[0], start, end, names[1], key.raw)
        ids = _name_key(names[0]), _name_key(names[1])
    except (IndexError, ValueError) as err:
        raise CMPError("not an X.509 certificate") from err
    extensions, subject_key, authority_key = {UNREADABLE: b""}, b"", b""
    with contextlib.suppress(*MALFORMED):  # openssl has accepted it, so it is served
        parsed = [_members(e) for e in _sequence(fields[-1].value)] if fields[-1].tag == 0xA3 else []
        found = {_oid(extension[0].value): extension[-1].value for extension in parsed}
        extensions = found if len(found) == len(parsed) else extensions  # of two, everybody reads another one
        subject_key = next(_elements(found.get(SUBJECT_KEY_ID, b"\x04\x00"))).value
        authority_key = _by_tag(_sequence(found.get(AUTHORITY_KEY_ID, b"\x30\x00"))).get(0x80, b"")
    return Certificate(der, *about, *ids, extensions, subject_key, authority_key)


def _pem(der: bytes, label: str = "CERTIFICATE") -> str:
    lines = re.findall(".{1,64}", base64.b64encode(der).decode())
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""])


def _decode(argument: object, label: str) -> bytes:
    """The DER in base64url or base64, with or without padding, or in PEM. Raises CMPError where there is none."""
    text = argument.decode("ascii", "replace") if isinstance(argument, bytes) else argument
    if not isinstance(text, str) or not text.strip():
        raise CMPError("it is empty")
    if len(text) > MAX_DER * 4 // 3 + MAX_DER // 32:  # in base64, with line breaks
        raise CMPError(f"it is larger than {MAX_DER} bytes")
    # At the start alone: base64url can contain these characters too, and acme2certifier would decode it.
    if text.lstrip().startswith("-----BEGIN"):
        match = re.search(rf"-----BEGIN {label}-----([^-]*)-----END", text)
        if not match:
            raise CMPError("it is PEM of another kind, or cut short")
        text = match.group(1)
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        der = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as err:
        raise CMPError("it is not base64, or cut short") from err
    _sequence(der)
    return der


# PKIBody, RFC 4210 section 5.1.2: the tags of a CA's answers, and of the request that confirms a certificate.
IP, CP, RP, PKICONF, ERROR, CERTCONF, POLLREP = 1, 3, 12, 19, 23, 24, 26
# PKIStatus, 5.2.3. GOOD is a yes, two of them with a warning; GRANTED is what a certConf says that takes a certificate.
GRANTED, REJECTION, WAITING, GOOD = (0, 1), 2, 3, (0, 1, 4, 5)
# PKIFailureInfo, 5.2.3, in the order of the bits.
FAILURES = (
    "badAlg badMessageCheck badRequest badTime badCertId badDataFormat wrongAuthority incorrectData missingTimeStamp"
    " badPOP certRevoked certConfirmed wrongIntegrity badRecipientNonce timeNotAvailable unacceptedPolicy"
    " unacceptedExtension addInfoNotAvailable badSenderNonce badCertTemplate signerNotTrusted transactionIdInUse"
    " unsupportedVersion notAuthorized systemUnavail systemFailure duplicateCertReq"
).split()
MAC_ALGORITHMS = ("1.2.840.113533.7.66.13", "1.2.840.113549.1.5.14")  # PasswordBasedMac, PBMAC1


class Message(NamedTuple):
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
    sender: bytes = b""  # the name in the header, if it is a directoryName
    sent: bytes = b""  # the certificates in extraCerts and caPubs, one after the other
    content: bytes = b""  # of its body

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

    def words(self, secrets: Collection[str]) -> str:
        """What it says, for people: `badCertTemplate, 'unknown extension'`."""
        status = {WAITING: "waiting", REJECTION: "rejection", None: "nothing"}.get(self.status, f"status {self.status}")
        said = [", ".join(self.failures) or status + (", and no certificate" if self.status in GOOD else "")]
        said += [f"'{_foreign(', '.join(self.texts), secrets)}'"] if self.texts else []
        said += [f"errorCode {self.error_code}"] if self.error_code is not None else []
        same = {*self.texts}  # some CAs say the same in both, and anybody can say 16,000 different things
        details = [detail for detail in self.details if detail not in same]
        said += [f"'{_foreign(', '.join(details), secrets)}'"] if details else []
        return ", ".join(said)


def _saved_message(path: str, headers: bool = False) -> Message | None:
    """Read a saved message, or only its header; None where it is not a whole one."""
    try:
        with open(path, "rb") as file:
            header, body, *rest = _sequence(file.read(MAX_DER))
        _, sender, _, *optional = _elements(header.value)
        fields, more, kind = _by_tag(optional), _by_tag(rest), body.tag & 0x1F
        # Not a generator: there StopIteration would become a RuntimeError.
        identifier, nonce, asked = [next(_elements(fields.get(tag, b"\x04\x00"))).value for tag in (0xA4, 0xA5, 0xA6)]
        transaction, nonces = _one_line(identifier.hex(), 64), (nonce, asked)
        if headers:
            return Message(path, kind, transaction, nonces)
        name = next(_elements(sender.value)).raw if sender.tag == 0xA4 else b""
        mac = 0xA0 in more and _oid(_sequence(fields.get(0xA1, b"\x30\x02\x06\x00"))[0].value) in MAC_ALGORITHMS
        capubs = _by_tag(_sequence(body.value)).get(0xA1) if kind in (IP, CP) else None
        sent = b"".join(next(_elements(found)).value for found in (more.get(0xA1), capubs) if found)
    except (FileNotFoundError, *MALFORMED):
        return None
    message = Message(path, kind, transaction, nonces, 0xA0 in more, mac, sender=name, sent=sent)
    with contextlib.suppress(*MALFORMED):  # a body that nobody can read says nothing
        message = message._replace(content=body.value, **_body(kind, body.value))
    return message


def _body(kind: int, value: bytes) -> dict[str, Any]:
    """What a PKIBody says, as fields of a Message. Raises an error of DER where it is malformed."""
    if kind == POLLREP:  # PollRepContent, 5.3.22
        _, check_after, *more = _elements(_sequence(value)[0].value)
        return {"check_after": _integer(check_after.value), "texts": _free_text(_by_tag(more))}
    if kind == RP:  # RevRepContent, 5.3.10
        return _status_info(next(_elements(_sequence(value)[0].value)).value)
    if kind == ERROR:  # ErrorMsgContent, 5.3.21
        status, *more = _sequence(value)
        fields = _by_tag(more)
        code = _integer(fields[0x02]) if 0x02 in fields else None
        return {**_status_info(status.value), "error_code": code, "details": _free_text(fields)}
    if kind == CERTCONF:  # CertConfirmContent, 5.3.18: no statusInfo means accepted
        _, _, *more = _elements(_sequence(value)[0].value)
        info = _by_tag(more).get(0x30)  # hashAlg may follow, with or without it (RFC 9480, 2.10)
        return {"status": 0} if info is None else _status_info(info)
    if kind in (IP, CP):  # CertRepMessage, 5.3.4: caPubs may come first
        _, status, *more = _elements(next(_elements(_by_tag(_sequence(value))[0x30])).value)
        pair = _by_tag(_elements(_by_tag(more).get(0x30, b"")))  # rspInfo may follow, with or without it
        return {**_status_info(status.value), "certificate": pair.get(0xA0, b"")}
    return {}


def _status_info(info: bytes) -> dict[str, Any]:
    """PKIStatusInfo, 5.2.3."""
    status, *more = _elements(info)
    fields = _by_tag(more)
    bits = fields.get(0x03, b"")
    numbers = [8 * i + bit for i, octet in enumerate(bits[1:5]) for bit in range(8) if octet & 0x80 >> bit]
    failures = tuple(FAILURES[number] for number in numbers if number < len(FAILURES))
    return {"status": _integer(status.value), "failures": failures, "texts": _free_text(fields)}


def _integer(value: bytes) -> int:
    """An INTEGER. One that is larger than any real one is none."""
    if len(value) > 16:
        raise CMPError("a number that is too large")
    return int.from_bytes(value, "big", signed=True)


def _free_text(fields: Mapping[int, bytes]) -> tuple[str, ...]:
    """PKIFreeText, 5.1.1, which is the only SEQUENCE wherever it may be."""
    return tuple(text.value.decode("utf-8", "replace") for text in _elements(fields.get(0x30, b"")))


# --- The command line ---------------------------------------------------------------------------------------

# Nothing above knows it, and nothing below runs under acme2certifier: it calls the same code with the same section.

DONE, FAILED, WRONG_USAGE, NOT_DECIDED, WRONG_CONFIGURATION, TRY_AGAIN = range(6)
EXIT_CODES = {UNREACHABLE: TRY_AGAIN, DISK: TRY_AGAIN, BUSY: TRY_AGAIN}
EXIT_CODES.update({CONFIGURATION: WRONG_CONFIGURATION, UNAUTHENTIC: WRONG_CONFIGURATION})
USAGE = """\
examples:
  %(prog)s convert openssl cmp -cmd ir -server 10.0.0.1:8080 ...
  %(prog)s convert < command.txt
  %(prog)s check --connect --config acme_srv.cfg
  %(prog)s enroll www.csr -o www.pem
  %(prog)s poll 3f0c77d1a9e25d0b61c8f2b7d4e09a16
  %(prog)s revoke www.pem --reason superseded

exit codes:
  0 done                                    3 the CA has not decided yet
  1 failed for good: the CA's no, the CSR   4 wrong configuration, untrue answer
  2 wrong usage, no such file               5 try again later: the CA, the disk
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. Results go to standard output, all else to standard error."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell has closed it
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 - until the end
    defaults = {"config": os.environ.get("ACME_SRV_CONFIGFILE"), "section": "CAhandler", "output": None}
    args = _parser().parse_args(argv, types.SimpleNamespace(**defaults, verbose=False, json=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know less than a file may hold
    try:
        code = _convert(args.words or _typed_words()) if args.command == "convert" else _handler_command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough: nothing is left to say, and Python is not to try at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (Exception, KeyboardInterrupt) as err:
        kind, text = _explained(err) if isinstance(err, Exception) else (INTERNAL, "interrupted")
        code = EXIT_CODES.get(kind, FAILED)
        if isinstance(err, (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)):
            # A file that was named wrongly.
            code, text = WRONG_USAGE, f"{err.strerror}: {err.filename or 'the current directory'}"
        about = {"id": args.argument} if args.command == "poll" else {}
        with contextlib.suppress(CMPError):
            _show(args, {"status": "failed", **about, "error": text, "class": kind}, f"error: {text}\n", sys.stderr)
        return code


def _show(args: Any, told: object, text: str, stream: IO[str]) -> None:
    """Print `text`, or, if that was asked for, `told` as JSON: always to standard output."""
    stream = sys.stdout if args.json else stream
    try:
        stream.write(json.dumps(told) + "\n" if args.json else text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python is not to try again at its end
        raise CMPError(f"cannot write the result: {err.strerror}", INTERNAL) from err


def _parser() -> Any:
    """What can be typed; the options that all commands have may stand before the command, too."""
    import argparse  # here, so that acme2certifier loads this file fast
    import hashlib

    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--config", metavar="FILE", help="default: $ACME_SRV_CONFIGFILE, or acme2certifier's")
    common.add_argument("--section", metavar="NAME", help="such as CAhandler:internal")
    common.add_argument("-v", "--verbose", action="store_true", help="show the log, and openssl's messages")
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(parents=[common], formatter_class=raw, epilog=USAGE)
    parser.description = "Try and check a [CAhandler] section of acme2certifier."
    with open(__file__, "rb") as file:
        build = hashlib.sha256(file.read()).hexdigest()[:16]  # tells a changed file from a released one
    parser.add_argument("--version", action="version", version=f"{__version__} (sha256 {build})")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, argument, about in (
        ("check", "", "report every error in the configuration, and what would be run"),
        ("enroll", "CSR", "get a certificate for a CSR file, PEM or DER"),
        ("poll", "ID", "go on with an enrolment that waits for the CA"),
        ("list", "", "list the enrolments that wait"),
        ("revoke", "CERT", "revoke a certificate, PEM or DER"),
        ("cacerts", "", "ask the CA for its certificates, for cmp_untrusted"),
    ):
        command = commands.add_parser(name, parents=[common], help=about)
        if argument:
            command.add_argument("argument", metavar=argument)
        if name in ("enroll", "poll", "cacerts"):
            command.add_argument("-o", "--output", metavar="FILE", help="write the PEM there, not to standard output")
        if name == "check":
            command.add_argument("--connect", action="store_true", help="also ask the CMP server, and judge its answer")
            command.add_argument("--lock-test", action="store_true", help="hold a lock in cmp_tmp_dir for 10 seconds")
        if name == "revoke":
            command.add_argument("--reason", default="unspecified", help="one of " + ", ".join(REASONS))
    convert = commands.add_parser("convert", help="turn an openssl cmp command line into a [CAhandler] section")
    convert.add_argument("words", nargs=argparse.REMAINDER, metavar="openssl cmp ...")
    return parser


def _handler_command(args: Any) -> int:
    """Run a command with the handler that the configuration describes."""
    logger, shown = logging.getLogger("cmp_ca_handler"), logging.StreamHandler()
    if not args.verbose:  # errors are printed anyway, and `check` is about the configuration
        told = ("configuration", "openssl cmp", "CMP ")
        shown.addFilter(lambda record: record.name == logger.name and not str(record.msg).startswith(told))
    logger.addHandler(shown)
    logger.setLevel(logging.DEBUG if args.verbose else logging.WARNING)
    logger.propagate = False
    path = _find_configuration(args.config)
    with CAhandler(False, logger) as handler:
        if not handler.config_error:
            names = ", ".join(_one_line(name) for name in handler._config if name.startswith("CAhandler:"))
            if args.section not in handler._config:
                raise CMPError(f"the configuration has no section [{_one_line(args.section)}]")
            if args.section != "CAhandler":  # that one is read
                handler.section.update(_our_entries(handler._config[args.section]))
            elif names and "cmp_server" not in handler.section:
                raise CMPError(f"[CAhandler] has no cmp_server: name a section with --section: {names}")
        if args.command == "check":
            return _check_command(handler, path, args)
        if args.command == "list":
            return _list_command(handler._waiting_settings(), args)
        with _output_file(args.output or os.devnull):
            return _ask_command(handler, args)


def _find_configuration(named: str | None) -> str:
    """Say which file is the configuration, the nearest one. Empty where acme2certifier is to look for its own."""
    here = os.path.dirname(os.path.abspath(__file__))
    if os.path.basename(here) == "acme_srv":  # copied into an old release: its helper lies beside this file
        sys.path.append(os.path.dirname(here))
    places = [os.path.abspath(name) for name in ("acme_srv.cfg", "acme_srv/acme_srv.cfg", f"{here}/acme_srv.cfg")]
    found = named or next(filter(os.path.exists, places), "")
    who = _writable_by_others(_about_file(found)) if found and not named else ""
    if who and os.geteuid() == 0:  # it names programs to run, and this may be anybody's directory
        raise CMPError(f"{found} {who}, or name it with --config")
    if found:
        with open(found, "rb"):  # or else its helper takes it for an empty one
            os.environ["ACME_SRV_CONFIGFILE"] = found
    elif _acme2certifier_helper() is None:
        what = f"there is none of {', '.join(places)}"
        raise CMPError(f"no configuration: {what}; name it with --config, or in ACME_SRV_CONFIGFILE")
    return os.path.abspath(found) if found else ""


@contextmanager
def _output_file(path: str) -> Iterator[None]:
    """Open a file for the bundle before the CA is asked; one that stays empty is not left behind."""
    new = not os.path.lexists(path)
    try:
        with open(path, "ab"):
            yield
    finally:
        if new and os.path.isfile(path) and not os.path.getsize(path):
            os.remove(path)


def _ask_command(handler: CAhandler, args: Any) -> int:
    """Ask the CA, print how it ended, and give the exit code. Raises CMPError where it failed."""
    error, text, identifier = None, None, None
    if sys.stderr.isatty():
        print("asking the CA ...", file=sys.stderr)
    if args.command == "cacerts":
        text = _ca_certificates(handler._checked(handler.section), handler.logger)
    elif args.command == "revoke":
        _, _, error = handler.revoke(_argument_file(args.argument), args.reason)
        text = "revoked\n"
    elif args.command == "enroll":
        error, text, _, identifier = handler.enroll(_argument_file(args.argument))
    else:
        handler.ask_always = True
        error, text, _, identifier, _ = handler.poll("", args.argument, "")
    if error:
        raise CMPError(error, handler.failure)
    if text is None:
        busy = handler.failure == BUSY
        why = "another poll of it is in progress" if busy else "the CA has not decided yet"
        _show(args, {"status": "waiting", "id": identifier}, f"{identifier}\n", sys.stdout)
        if not args.json:
            print(f"{why}; go on with: poll {identifier}", file=sys.stderr)
        return TRY_AGAIN if busy else NOT_DECIDED
    left = _written(args.output, text) if args.output else text
    told = {"status": "done", "result": left, "id": identifier}
    _show(args, {key: value for key, value in told.items() if value}, left, sys.stdout)
    return FAILED if args.output and left else DONE


def _argument_file(path: str) -> str:
    """A CSR or certificate from a PEM or DER file, as acme2certifier would hand it over."""
    with open(path, "rb") as file:
        data = file.read(2 * MAX_DER)
    if data[:1] == b"\x30":
        return base64.b64encode(data).decode()
    text = data.replace(b"\0", b"").decode("latin-1")  # Microsoft's Exchange writes UTF-16
    return text[max(text.find("-----BEGIN"), 0) :]  # without what `openssl req -text` puts before it


def _written(path: str, text: str) -> str:
    """Write a bundle to a file. What is left to print: where that fails all, for what is issued must not get lost."""
    try:
        with open(path, "wb") as file:
            file.write(text.encode())
        return ""
    except OSError as err:
        print(f"error: {path}: {err.strerror}; the bundle is on standard output", file=sys.stderr)
        with contextlib.suppress(OSError):  # half a bundle is worse than none
            os.truncate(path, 0)
        return text


def _list_command(settings: Settings, args: Any) -> int:
    """Print the orders that wait."""
    names, orders = os.listdir(settings.directory) if os.path.isdir(settings.directory) else [], []
    for name in sorted(names):
        transaction = Transaction(settings, name, "waiting", -1, logging.getLogger(__name__))
        if not os.path.exists(transaction.file("waiting")) or os.path.exists(transaction.file("issued")):
            continue
        with contextlib.suppress(FileNotFoundError):  # a poll has finished it meanwhile
            about = {"id": name, "names": "(unreadable)", "since": _iso(os.stat(transaction.file("csr.pem")).st_mtime)}
            with contextlib.suppress(CMPError, PermissionError):
                about["names"] = _wanted(_read_csr(transaction.read("csr.pem")))
            with contextlib.suppress(PermissionError):
                answers = transaction.usable()
                due = _due(answers) if answers else 0
                about.update(next=_iso(due) if due else "now", transaction=transaction.cmp_id or "unknown")
            orders.append(about)
    _show(args, orders, "".join(f"{_pairs(order)}\n" for order in orders), sys.stdout)
    return DONE


def _check_command(handler: CAhandler, path: str, args: Any) -> int:
    """Print what the configuration amounts to, and everything that is wrong with it."""
    import shlex

    about: dict[str, str] = {"file": path or "that of acme2certifier"}
    findings: list[Finding] = [(handler.config_error, FATAL)] if handler.config_error else []
    shown, hidden, command = [], [], ""
    if not findings:  # or else there is no section, and all that could be said of it would be untrue
        settings = _settings(handler.section)
        missing = [place for place, info in _way(settings.directory) if info is None]
        with contextlib.suppress(OSError):  # a full disk: _directory_findings tells
            settings = _dry_run(settings)
        known, hidden = settings.binary.options, [*settings.hidden]
        about["openssl"] = f"{settings.binary.path}  {settings.binary.version}" if known else "not usable"
        able = {"all extensions of a CSR": settings.binary.since(3, 0), "waiting enrolments": "rspin" in known}
        able["profiles"] = "profile" in known
        about["able"] = ", ".join(f"{what}: {'yes' if can else 'no'}" for what, can in able.items()) if known else ""
        about["tmp_dir"] = settings.directory
        shown = [f"  {_one_line(k) + ':':<24} {_shown(k, value, settings)}" for k, value in handler.section.items()]
        findings += [(text, WARNING) for text in settings.warnings] + [(text, FATAL) for text in settings.errors]
        questions = [*_acme2certifier_findings(handler, settings, args.section)]
        if not settings.errors:
            questions += _directory_findings(settings, args.lock_test)
            questions += _answer_findings(settings, handler.logger, about) if args.connect else ()
            command = _hide(shlex.join(map(_one_line, _command(settings, []))), hidden)
        findings += [(text, fatal) for wrong, text, fatal in questions if wrong]
        for place in missing:  # made by root, acme2certifier could not use them
            with contextlib.suppress(OSError):
                os.rmdir(place)
    about = {key: _hide(value, hidden) for key, value in about.items() if value}
    told = [{"level": "error" if fatal else "warning", "text": _hide(text, hidden)} for text, fatal in findings]
    wrong = any(fatal for _, fatal in findings)
    lines = [f"{key if key != 'able' else '':<9} {_one_line(value, 400)}" for key, value in about.items()]
    lines += ["", *shown, "", *(f"{finding['level']}: {finding['text']}" for finding in told)]
    if not wrong:
        lines += ["an enrolment would run:", "  " + re.sub(r" (?=-)", " \\\\\n      ", command), "no errors found"]
    report = {**about, "command": command, "findings": told, "ok": not wrong}
    _show(args, report, "\n".join([*lines, ""]), sys.stdout)
    return WRONG_CONFIGURATION if wrong else DONE


def _shown(key: str, value: str, settings: Settings) -> str:
    """The value of an entry, unless it is a secret: a misspelt one of a secret has a secret for its value, too."""
    option, known = _option_name(key[4:]), settings.binary.options
    public = option in known.keys() - settings.binary.mock_server or option in OURS or (not known and option in OPTIONS)
    public = public and key.startswith("cmp_") and _option(option).kind not in ("secret", "run", "other")
    # By mistake, the secret itself may stand where its variable belongs.
    mistaken = (option.endswith("_variable") and value not in os.environ) or "-----BEGIN" in value
    password = option in ("server", "proxy") and "@" in value
    if value and (mistaken or password or not public):
        return "(hidden)"
    return _foreign(value, settings.hidden, 200)


def _acme2certifier_findings(handler: CAhandler, settings: Settings, section: str) -> Iterator[Question]:
    """What acme2certifier itself is configured to do, beside our section."""
    import filecmp

    config, total = handler._config, settings.seconds("total_timeout") or NO_TIMEOUT
    limit = config.get("Certificate", "enrollment_timeout", fallback="").strip()
    early = not limit or (limit.isdecimal() and int(limit) <= total)
    what = f"enrollment_timeout is {limit or 'not set, which means 5'}: acme2certifier stops waiting too early"
    yield early, f"[Certificate] {what}; set it to {total + 5}", WARNING
    unchecked = config.get("Challenge", "challenge_validation_disable", fallback="").lower() in (*ON, "1")
    yield unchecked, "[Challenge] challenge_validation_disable is on: every ACME client gets every name", WARNING
    names = [config.get(name, "server_name", fallback="") for name in ("DEFAULT", "Directory")]
    yield "://" in "".join(names), "server_name: delete http:// or https:// from it", WARNING
    load = getattr(handler._helper, "ca_handler_load", None)
    if load is None:
        return  # without acme2certifier nobody can know what it loads
    entries, here, loaded = {**config["CAhandler"], **config[section]}, os.path.realpath(__file__), None
    name = next((key for key in ("handler_module", "handler_file") if entries.get(key)), "handler_module")
    with contextlib.suppress(Exception):  # acme2certifier knows best which file it takes
        loaded = load(logging.getLogger("cmp_ca_handler.loader"), {"CAhandler": entries}).__file__
    what = f"acme2certifier loads no CA handler ({name}: {_one_line(str(entries.get(name) or 'not set'), 100)})"
    yield not loaded, f"{what}: install this file (pip install .), set handler_module: cmp_ca_handler", FATAL
    cure = "delete handler_file" if name == "handler_file" else "set handler_module: cmp_ca_handler"
    what = f"acme2certifier loads {loaded} ({name}), not this file, which is {here}: {cure}, or copy this file there"
    yield loaded and not filecmp.cmp(loaded, __file__, shallow=False), what, FATAL


def _directory_findings(settings: Settings, lock_test: bool) -> Iterator[Question]:
    """Whether cmp_tmp_dir has room, and locks that others see, as several machines need it."""
    _make_directory(settings)
    try:
        _check_room(settings.directory)
    except OSError as err:
        yield True, f"cmp_tmp_dir {settings.directory}: {err.strerror}: make room there", FATAL
    path, mounts = os.path.realpath(settings.directory) + "/", [["", "", ""]]
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
        found = (line.split()[1:4] for line in file)  # where Linux tells: place, type, options
        mounts += [mount for mount in found if path.startswith(mount[0].rstrip("/") + "/")]
    _, system, options = sorted(mounts, key=lambda mount: len(mount[0]))[-1]
    alone = "sshfs" in system or (system.startswith("nfs") and re.search(r"nolock|local_lock=(all|flock)", options))
    what = f"cmp_tmp_dir is on {system}, whose locks other machines do not see"
    yield alone, f"{what}: two pollers of one order would lose it", WARNING
    if lock_test:
        path = f"{settings.directory}/lock-test"
        try:
            lock = _locked(path, new=not os.path.exists(path))
        except BlockingIOError:
            print(f"lock test: somebody else holds {path}: locks exclude each other here", file=sys.stderr)
            return
        what = "run the same on the other machine now: it must say that somebody else holds it"
        print(f"lock test: holding {path} for 10 seconds: {what}", file=sys.stderr)
        time.sleep(10)
        with contextlib.suppress(FileNotFoundError):  # two that began at the same moment
            os.remove(path)
        _unlock(lock)


def _answer_findings(settings: Settings, logger: logging.Logger, about: dict[str, str]) -> Iterator[Question]:
    """Ask the CMP server with a general message (RFC 4210, 5.3.19), through the very options of an enrolment."""
    run, answer = _general_message(settings, "", logger)
    run = run._replace(lines=[line for line in run.lines if not NO_ANSWER_TO_GENM.search(line.text)])
    about["connect"] = next((c.group(1) for x in run.lines if (c := WILL_CONTACT.match(x.text))), settings.server)
    # What is proven is proven by the message that openssl has accepted; its text only says what is wrong.
    accepted = run.only(AFTER_ACCEPTANCE) or run.only(TIME_IS_UP)
    authentic = run.code == 0 or (answer is not None and answer.protected and accepted)
    quiet = int(settings.options.get("verbosity") or SAYS_SENDING) < SAYS_SENDING
    tried = quiet or any(SENT.match(line.text) for line in run.lines)
    reached = bool(answer) or (tried and not any(map(CONNECT_TIMEOUT.match, run.errors())))
    # Who is on the way can add lines to openssl's text, but cannot take away the one that says that TLS has failed.
    tls = bool(answer) or (bool(run.errors()) and not any(map(TLS_FAILED.search, run.errors())))
    proven = {"address": reached, **({"TLS": tls} if settings.tls else {}), "path": bool(answer), "trust": authentic}
    # A CA may sign its no for anybody. Only those who have the secret can make a MAC with it.
    proven["credentials"] = authentic and (run.code == 0 or bool(answer and answer.mac))
    words = {True: "yes", False: "no" if reached else "not reached"}
    about["proven"] = ", ".join(f"{what}: {words[yes]}" for what, yes in proven.items())
    if authentic and answer and answer.sender and not answer.mac:
        about["sender"] = f"cmp_expect_sender: {_name_text(_name(answer.sender))}"
    if run.code != 0:
        text, _ = _failure_text(run, answer, settings)
        refused = answer and {"badMessageCheck", "wrongIntegrity", "signerNotTrusted"} & {*answer.failures}
        what = "the CA answers authentically that it takes no general message, as EJBCA does"
        yield not authentic, text, FATAL
        yield authentic and refused, f"the CA does not accept the credentials: {text}", FATAL
        yield authentic and not refused, f"{what}; an enrolment may still work: {text}", WARNING


def _general_message(settings: Settings, information: str, logger: logging.Logger) -> tuple[Run, Message | None]:
    """Send a general message, for some `information` or none; how openssl ended, and the answer as it was saved."""
    recipient, settings = settings.options.get("issuer"), settings.without_enrolment("genm")
    with closing(_begin(settings, "asking", logger)) as transaction:
        saved = transaction.file("capubs.pem")  # that it writes, and insists on
        arguments = ["-infotype", information, "-cacertsout", saved] if information else []
        if recipient and not settings.options.keys() & {"recipient", "srvcert"}:
            arguments += ["-recipient", recipient]  # as openssl does it for an enrolment
        arguments += _saving(transaction, range(1, MAX_REQUESTS)) if "rspout" in settings.binary.options else []
        run = _openssl_cmp(transaction, arguments)
        answer = next(reversed(transaction.answers()), None)
    _log_messages(logger, run, settings)
    return run, answer


def _ca_certificates(settings: Settings, logger: logging.Logger) -> str:
    """Ask for the CA's certificates (RFC 9480, 2.14): PEM. Raises CMPError where it sends none."""
    if not settings.binary.options.keys() >= {"infotype", "rspout", "cacertsout"}:
        raise CMPError(f"{settings.binary.version} cannot ask for CA certificates, OpenSSL 3.0 can")
    run, answer = _general_message(settings, "caCerts", logger)
    if (run.code != 0 or answer is None) and not any(map(NO_CA_CERTS.search, run.errors())):
        raise CMPError(*_failure_text(run, answer, settings))
    found: list[Certificate] = []
    # Out of the saved answer: the file that 3.0 writes is empty.
    for information in _sequence(answer.content) if run.code == 0 and answer else ():
        identifier, *values = _members(information)
        if _oid(identifier.value) == "1.3.6.1.5.5.7.4.17" and values:  # id-it-caCerts
            found += [_certificate(element.raw) for element in _members(values[0])]
    if not found:
        raise CMPError(f"CMP server {settings.server} sends no certificates: ask the CA's operator", REFUSED)
    for certificate in found:
        name = _hide(_name_text(certificate.subject), settings.hidden)
        print(f"{name}, valid until {certificate.not_after}", file=sys.stderr)
    return "".join(_pem(certificate.der) for certificate in found)


def _typed_words() -> list[str]:
    """The words of a command line on standard input."""
    import shlex

    text = re.sub(r"[\\^`]\s*\n(\s*>+ |More\? )?", " ", sys.stdin.read())  # lines of sh, cmd.exe, PowerShell
    variable = re.search(r"\$[{(]?\w+|`|%[A-Za-z_]\w{2,}%", re.sub(r"'[^']*'", "", text))
    if variable:
        what = "is a variable of the shell, whose value is not known here"
        raise CMPError(f"{variable.group()} {what}: write the value, or for a secret env:NAME")
    text = text.replace("\\", "\\\\") if os.sep == "\\" else text  # in a path, and no quote
    try:
        return shlex.split(text.lstrip("$# \t"))
    except ValueError as err:
        raise CMPError(f"not a command line: {err}") from err


def _convert(words: list[str]) -> int:
    """Print the `[CAhandler]` section for an `openssl cmp` command line, and what is wrong with that."""
    if "cmp" not in words:
        raise CMPError("write an `openssl cmp` command line behind convert, or give it on standard input")
    position = words.index("cmp")
    program, rest = words[position - 1].rpartition(">")[2] if position else "openssl", words[position + 1 :]
    binary = _binary(program if shutil.which(program) else "openssl")  # it may be on another machine
    found, set_by_us = {}, []
    assigned = [word.partition("=")[0] for word in words[:position] if "=" in word]
    errors = [f"{name}=: set this variable for acme2certifier's process, too" for name in assigned]
    while rest:
        option, equals, value = rest.pop(0).lstrip("-").partition("=")
        option = _option_name(option, binary.options)
        kind, takes_value = _option(option).kind, bool(equals)
        if not equals and binary.options.get(option, bool(rest) and rest[0][:1] != "-"):
            takes_value, value = True, rest.pop(0) if rest else "\0"
        try:
            _check_entry(f"cmp_{option}", option, binary)
            _raise_first((value == "\0", "needs a value, and the command line ends there"))
            usual = (option, value) in (("cmd", "ir"), ("popo", "0"), ("config", ""))
            if usual or kind == "run" or option == "subject":
                set_by_us.append(f"-{option}")
            elif value or not takes_value:  # an empty value is none
                _raise_first((option in found, "is there twice, and a section holds one"))
                found[option] = _comma_dn(value) if kind == "name" else value or "True"
                lost = takes_value and option != "profile" and (value != value.strip() or value.lower() in (*ON, *OFF))
                _raise_first((lost, "a section cannot hold this value: use a variable or a file, or another value"))
                _check_text(option, found[option])
        except CMPError as err:
            errors.append(f"cmp_{option}: {err}")
    if not found.keys() & {"server", "config", "section"}:
        errors.append("there is no -server, nor -config or -section, where it may stand")
    print("[CAhandler]\nhandler_module: cmp_ca_handler")
    if set_by_us:
        print(f"# set by the handler itself: {' '.join(set_by_us)}")
    print(f"cmp_openssl_bin: {program}")
    print("# cmp_tmp_dir: a directory that lasts, for enrolments that wait for the CA")
    for option in filter(found.get, dict.fromkeys([*"server path cert key ref secret trusted".split(), *found])):
        if _option(option).kind == "secret" and found[option].partition(":")[0] not in ("env", "file"):
            better = "cmp_secret_variable: NAME" if option == "secret" else f"cmp_{option}: env:NAME"
            print(f"# this file contains the secret; use {better} instead, with the secret in that variable")
        print(f"cmp_{option}: {found[option]}")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return FAILED if errors else DONE


def _comma_dn(value: str) -> str:
    """`/C=DE/CN=x` as `C=DE, CN=x`: the reverse of `_slash_dn`."""
    parts = _attributes(value) if value.startswith("/") else ()
    text = "".join((", " if sign == "/" else "+") + f"{kind}={_escaped(part)}" for sign, kind, part in parts)
    return text[2:] or value


if __name__ == "__main__":
    sys.exit(main())
