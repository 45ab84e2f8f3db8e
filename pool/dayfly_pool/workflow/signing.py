"""Who says so: statements in DSSE envelopes, signed with the installation's Ed25519 key.

The envelope (https://github.com/secure-systems-lab/dsse) signs a payload's exact bytes, so nothing
has to be parsed before it is believed. A key's id is the sha256 of its DER, which is what
`openssl pkey -pubin -in key.pem -outform DER | sha256sum` prints.

The libraries that sign are imported at first use: 0.1 to 0.2 s and 12 MiB, in a thread please.
"""

import base64
import binascii
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from dayfly_pool.errors import BadInput, DataFolderUnusable, NotVerified
from dayfly_pool.workflow import provenance
from dayfly_pool.workflow.provenance import STATEMENT_BYTES_MAX, Statement

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
SIGNATURES_MAX: Final = 16
KEYS_MAX: Final = 1000
PEM_BYTES_MAX: Final = 16 << 10
ENVELOPE_BYTES_MAX: Final = STATEMENT_BYTES_MAX // 3 * 4 + (64 << 10)
SIGNATURE_BYTES: Final = 64
_KEY: Final = "signing-key.pem"
_SHOWN_CHARACTERS: Final = 80


class Signature(Struct, frozen=True):
    """One signature; its *keyid* is a hint of whoever wrote the envelope, and is not signed."""

    sig: Annotated[str, Meta(max_length=1024)]
    keyid: Annotated[str, Meta(max_length=256)] = ""


class Envelope(Struct, frozen=True, rename={"payload_type": "payloadType"}):
    """A payload in base64, and who signed it."""

    payload: str
    payload_type: Annotated[str, Meta(max_length=256)]
    signatures: Annotated[tuple[Signature, ...], Meta(max_length=SIGNATURES_MAX)]


class InstallationKey:
    """The key that this installation signs with, in *folder*: made when it is first asked for.

    Its methods wait for the disk, and may be called from any thread. They raise
    `DataFolderUnusable` when the key cannot be read or kept, or others may read it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: tuple[CryptoSigner, bytes] | None = None

    @property
    def id(self) -> str:
        """What signatures call it."""
        return self._open()[0].public_key.keyid

    @property
    def public_pem(self) -> bytes:
        """What whoever verifies must have from a source that they trust."""
        return self._open()[1]

    def sign(self, statement: Statement) -> bytes:
        """The envelope, as JSON. Raises `BadInput` for a statement that is too large."""
        from securesystemslib.dsse import Envelope as Signed

        signed = Signed(provenance.encode(statement), PAYLOAD_TYPE, {})
        signed.sign(self._open()[0])
        return provenance.canonical(signed.to_dict())

    def _open(self) -> "tuple[CryptoSigner, bytes]":
        if self._opened is None:
            path = self._folder / _KEY
            try:
                if not path.exists():
                    _keep(path, _made())
                if path.stat().st_mode & 0o077:
                    raise DataFolderUnusable(f"{path} may be read by others: chmod 600 it")
                pem = path.read_bytes()
            except OSError as error:
                raise DataFolderUnusable(f"{path}: {error.strerror}") from error
            self._opened = _loaded(path, pem)
        return self._opened


def _made() -> bytes:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate().private_bytes(
        s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()
    )


def _keep(path: Path, pem: bytes) -> None:
    """Have a key there, whole and on the disk; of two that are made at once the first one stays."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor, part = tempfile.mkstemp(prefix=".", dir=path.parent)  # 0600
    try:
        with os.fdopen(descriptor, "wb") as to:
            to.write(pem)
            to.flush()
            os.fsync(to.fileno())
        try:
            os.link(part, path)
        except FileExistsError:
            return
    finally:
        os.unlink(part)
    for each in (path.parent, path.parent.parent):
        folder = os.open(each, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _loaded(path: Path, pem: bytes) -> "tuple[CryptoSigner, bytes]":
    """What signs, and its public key as PEM."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from securesystemslib.signer import CryptoSigner

    try:
        private = s.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DataFolderUnusable(f"{path} holds no key: put the right one back") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise DataFolderUnusable(f"{path} holds no Ed25519 key: put the right one back")
    public = private.public_key()
    public_pem = public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    return CryptoSigner(private, _identified(public)), public_pem


def _identified(public: Any) -> "SSlibKey":
    from cryptography.hazmat.primitives import serialization as s
    from securesystemslib.signer import SSlibKey

    der = public.public_bytes(s.Encoding.DER, s.PublicFormat.SubjectPublicKeyInfo)
    return SSlibKey.from_crypto(public, hashlib.sha256(der).hexdigest(), "ed25519")


# ---- believing it -------------------------------------------------------------------------------


def verify(envelope: bytes, public_keys: Iterable[bytes]) -> Statement:
    """The statement, if one of *public_keys* (PEM) signed exactly this, and none signed another.

    Signatures of others are passed over: an envelope may have been signed by several. Raises
    `BadInput` for what is no envelope or no key, `NotVerified` for what no known key has signed.
    """
    keys = [_public(pem) for pem in _few(public_keys)]
    parsed = _parsed(envelope)
    payload = _decoded("payload", parsed.payload)
    known = 0
    for signature in parsed.signatures:
        known += _is_of(signature, keys, pae(parsed.payload_type, payload))
    if not known:
        named = ", ".join(each.keyid[:_SHOWN_CHARACTERS] or "nobody" for each in parsed.signatures)
        given = ", ".join(key.keyid for key in keys[:3])
        raise NotVerified(f"signed by {named}, and the key that is trusted is {given}")
    return provenance.decode(payload)


def unverified(envelope: bytes) -> Statement:
    """What an envelope says, for people to look at: anybody may have written it.

    Raises `BadInput`, `NotVerified` for what nobody has signed at all.
    """
    return provenance.decode(_decoded("payload", _parsed(envelope).payload))


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed: DSSE's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def key_id(public_key: bytes) -> str:
    """What signatures call this public key (PEM). Raises `BadInput`."""
    return _public(public_key).keyid


def _few(public_keys: Iterable[bytes]) -> list[bytes]:
    keys = list(public_keys)
    if not 1 <= len(keys) <= KEYS_MAX:
        raise BadInput(f"{len(keys)} public keys: give 1 to {KEYS_MAX}")
    return keys


def _public(pem: bytes) -> "SSlibKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if len(pem) > PEM_BYTES_MAX:
        raise BadInput("that is no public key: give the PEM that `dayfly provenance key` prints")
    try:
        public = load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(
            "that is no public key: give the PEM that `dayfly provenance key` prints"
        ) from error
    if not isinstance(public, Ed25519PublicKey):
        raise BadInput("that public key is of another kind: an installation's is Ed25519")
    return _identified(public)


def _parsed(envelope: bytes) -> Envelope:
    if len(envelope) > ENVELOPE_BYTES_MAX:
        raise BadInput(
            f"an envelope of {len(envelope)} bytes: at most {ENVELOPE_BYTES_MAX} are read"
        )
    try:
        parsed = msgspec.json.decode(envelope, type=Envelope)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadInput(f"that is no DSSE envelope: {error}") from error
    if parsed.payload_type != PAYLOAD_TYPE:
        kind = parsed.payload_type[:_SHOWN_CHARACTERS]
        raise BadInput(f"the envelope holds {kind!r}: only {PAYLOAD_TYPE} is read here")
    if not parsed.signatures:
        raise NotVerified("nobody has signed it")
    named = [each.keyid for each in parsed.signatures if each.keyid]
    if len(set(named)) != len(named):
        raise BadInput("two signatures name the same key: which of them is meant is not said")
    return parsed


def _is_of(signature: Signature, keys: list["SSlibKey"], signed: bytes) -> bool:
    """Whether a known key made it. Raises `NotVerified` if it is said to be of one, and is not."""
    from securesystemslib.exceptions import UnverifiedSignatureError
    from securesystemslib.signer import Signature as Made

    for key in keys:
        if signature.keyid not in ("", key.keyid):
            continue
        made = _decoded("signature", signature.sig)
        try:
            if len(made) == SIGNATURE_BYTES:
                key.verify_signature(Made(key.keyid, made.hex()), signed)
                return True
        except UnverifiedSignatureError:
            pass
        if signature.keyid:
            raise NotVerified(f"this is not what {key.keyid} has signed: it was changed since")
    return False


def _decoded(what: str, text: str) -> bytes:
    """Base64, of either alphabet as DSSE has it."""
    try:
        return base64.b64decode(
            text.encode("ascii").translate(bytes.maketrans(b"-_", b"+/")), validate=True
        )
    except (binascii.Error, UnicodeEncodeError) as error:
        raise BadInput(f"the envelope's {what} is not base64: {error}") from error
