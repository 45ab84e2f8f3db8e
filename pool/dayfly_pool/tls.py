"""Who gateways and shards are to each other: TLS 1.3 with certificates of one authority.

A folder holds `ca.crt`, `tls.crt` and `tls.key`, as a Kubernetes Secret of type TLS does. What a
certificate's holder may be is in its DNS names: `gateway`, `pool`, or both.
"""

import datetime
import os
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from dayfly_pool.errors import BadInput, CertificatesUnusable

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

Role = Literal["gateway", "pool"]
ROLES: Final[tuple[Role, ...]] = ("gateway", "pool")
CALLS: Final = "dayfly/1"
"""The wire of `dayfly_pool.wire`. The other two are HTTP/1.1."""

DATA: Final = "dayfly-data/1"
ADMIN: Final = "dayfly-admin/1"
FILES: Final = ("ca.crt", "tls.crt", "tls.key")
VALID_DAYS: Final = 365


class Identity:
    """The certificates in *folder*. Files that change are used for what connects from then on.

    An authority that was taken out of `ca.crt` is not believed by new connections that we make;
    those that are made to us go by it until a restart.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: tuple[int, ...] = ()
        self._accepting: ssl.SSLContext | None = None
        self._connecting: dict[str, ssl.SSLContext] = {}

    def accepting(self) -> ssl.SSLContext:
        """For who listens: whoever connects must have a certificate. Raises as `refresh`."""
        if self._accepting is None:
            self._seen = self._stamps()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.verify_mode = ssl.CERT_REQUIRED
            context.set_alpn_protocols([CALLS, DATA, ADMIN])
            self._accepting = self._load(context)
        return self._accepting

    def connecting(self, protocol: str) -> ssl.SSLContext:
        """For who connects to speak *protocol*. Raises as `refresh`.

        The name to be asked for is the other's role.
        """
        self.refresh()
        context = self._connecting.get(protocol)
        if context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.set_alpn_protocols([protocol])
            self._connecting[protocol] = self._load(context)
        return context

    def refresh(self) -> bool:
        """Use the files as they are now; whether they have changed.

        Raises `CertificatesUnusable`, and then goes on with those that were there.
        """
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        if self._accepting is not None:
            self._load(self._accepting)
        self._connecting, self._seen = {}, stamps
        return True

    def _stamps(self) -> tuple[int, ...]:
        try:
            return tuple((self._folder / name).stat().st_mtime_ns for name in FILES)
        except OSError as error:
            raise CertificatesUnusable(f"{error.filename}: {error.strerror}") from error

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        authority, certificate, key = (str(self._folder / name) for name in FILES)
        try:
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_verify_locations(authority)
            context.load_cert_chain(certificate, key, password=_no_password)
        except (OSError, ValueError) as error:
            raise CertificatesUnusable(f"{self._folder}: {error}") from error
        return context


def _no_password() -> str:
    """Else OpenSSL would ask at a terminal."""
    raise ValueError("the key is encrypted: give one that is not, readable by this user alone")


def has_role(certificate: Any, role: Role) -> bool:
    """Whether a peer's certificate, which was verified, says that it may be *role*."""
    names = certificate.get("subjectAltName", ()) if isinstance(certificate, dict) else ()
    return ("DNS", role) in names


# ---- for trying out -----------------------------------------------------------------------------


def make(folder: Path) -> list[Path]:
    """Make an authority in *folder*, and below it a folder with a certificate for each role.

    One that is there already is used again, so that certificates can be made anew; they are valid
    for `VALID_DAYS`. Returns the roles' folders. Raises `BadInput` when it is not a folder of ours.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority, key = folder / "ca.crt", folder / "ca.key"
    if authority.exists() != key.exists():
        raise BadInput(f"{folder} has one of ca.crt and ca.key: give an empty folder")
    if authority.exists():
        signer = serialization.load_pem_private_key(key.read_bytes(), None)
        if not isinstance(signer, ec.EllipticCurvePrivateKey):
            raise BadInput(f"{key} was not made by this command: give an empty folder")
        ca = x509.load_pem_x509_certificate(authority.read_bytes())
    else:
        signer = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Dayfly")])
        ca = _signed(name, name, signer, signer, ())
        _write(key, _private(signer))
        _write(authority, _public(ca))
    made = []
    for role in ROLES:
        own = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, role)])
        where = folder / role
        where.mkdir(exist_ok=True, mode=0o700)
        _write(where / "ca.crt", _public(ca))
        _write(where / "tls.crt", _public(_signed(subject, ca.subject, own, signer, (role,))))
        _write(where / "tls.key", _private(own))
        made.append(where)
    return made


def _signed(
    subject: "x509.Name",
    issuer: "x509.Name",
    key: "EllipticCurvePrivateKey",
    signer: "EllipticCurvePrivateKey",
    names: tuple[str, ...],
) -> "x509.Certificate":
    """A certificate for *names*; an authority's when there is none."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    now = datetime.datetime.now(datetime.UTC)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    built = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=not names, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(authority, critical=False)
    )
    if names:
        built = built.add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False
        )
    return built.sign(signer, hashes.SHA256())


def _private(key: "EllipticCurvePrivateKey") -> bytes:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _public(certificate: "x509.Certificate") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _write(path: Path, content: bytes) -> None:
    """At once, and readable by us alone."""
    new = path.with_suffix(path.suffix + ".new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    new.replace(path)
