"""Envelopes: what the installation's key has signed is believed, and nothing else."""

import base64
import json
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from dayfly_pool.errors import BadInput, DataFolderUnusable, NotVerified, PlatformError
from dayfly_pool.workflow import provenance, signing
from dayfly_pool.workflow.provenance import Observed, StepSeen, statement
from dayfly_pool.workflow.signing import PAYLOAD_TYPE, InstallationKey, key_id, verify

ROOT = Path(__file__).parents[2]
SAID = statement(
    Observed(
        run="r1",
        namespace="default",
        workflow="forecast",
        definition_sha256="d" * 64,
        version="0.1.0",
        began_at=1.0,
        ended_at=2.0,
        status="Succeeded",
        params={"city": "Köln"},
        steps=(StepSeen(key="s", body="handler"),),
    )
)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> InstallationKey:
    return InstallationKey(tmp_path_factory.mktemp("data") / "provenance")


@pytest.fixture(scope="module")
def signed(key: InstallationKey) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(key.sign(SAID))
    return found


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> InstallationKey:
    return InstallationKey(tmp_path_factory.mktemp("other") / "provenance")


def sent(envelope: Any) -> bytes:
    return json.dumps(envelope).encode()


# ---- the key ------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path):
    folder = tmp_path / "provenance"
    first, again = InstallationKey(folder), InstallationKey(folder)

    assert first.id == again.id == key_id(first.public_pem)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [(p.name, p.stat().st_mode & 0o777) for p in folder.iterdir()] == [
        ("signing-key.pem", 0o600)
    ]


def test_of_two_that_make_it_at_once_both_have_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Or what one signed could never be verified. Here one makes it while the other does."""
    made, theirs = signing._made, list[str]()

    def meanwhile() -> bytes:
        monkeypatch.setattr(signing, "_made", made)
        theirs.append(InstallationKey(tmp_path / "p").id)
        return made()

    monkeypatch.setattr(signing, "_made", meanwhile)
    mine = InstallationKey(tmp_path / "p").id

    assert [mine] == theirs
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["signing-key.pem"]


def test_a_key_that_others_may_read_signs_nothing(tmp_path: Path):
    assert InstallationKey(tmp_path).id
    (tmp_path / "signing-key.pem").chmod(0o640)

    with pytest.raises(DataFolderUnusable, match="chmod 600"):
        InstallationKey(tmp_path).sign(SAID)


@pytest.mark.parametrize("what", ["damaged", "of another kind"])
def test_a_damaged_key_is_never_replaced(tmp_path: Path, what: str):
    """A new one would make all that was signed look forged."""
    path = tmp_path / "signing-key.pem"
    pem = b"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"
    if what == "of another kind":
        pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    path.write_bytes(pem)
    path.chmod(0o600)

    with pytest.raises(DataFolderUnusable, match="put the right one back"):
        InstallationKey(tmp_path).sign(SAID)
    assert path.read_bytes() == pem


def test_a_key_that_cannot_be_kept_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(signing.os, "fsync", fail)
    with pytest.raises(DataFolderUnusable, match="No space"):
        InstallationKey(tmp_path / "p").sign(SAID)

    assert list((tmp_path / "p").iterdir()) == []


# ---- believing ----------------------------------------------------------------------------------


def test_what_was_signed_is_read_as_it_was(key: InstallationKey, signed: dict[str, Any]):
    assert verify(sent(signed), [key.public_pem]) == SAID
    assert signed["signatures"][0]["keyid"] == key.id


def test_the_same_statement_gives_the_same_envelope(key: InstallationKey):
    assert key.sign(SAID) == key.sign(SAID)


def test_signed_bytes_are_those_of_the_protocols_own_example():
    """https://github.com/secure-systems-lab/dsse/blob/master/protocol.md"""
    kind = "http://example.com/HelloWorld"

    assert signing.pae(kind, b"hello world") == b"DSSEv1 29 " + kind.encode() + b" 11 hello world"


def test_one_of_several_keys_is_enough(
    key: InstallationKey, other: InstallationKey, signed: dict[str, Any]
):
    """Of before a change of keys, and after it."""
    assert verify(sent(signed), [other.public_pem, key.public_pem]) == SAID


def test_an_unknown_key_is_named(other: InstallationKey, signed: dict[str, Any]):
    with pytest.raises(NotVerified, match=signed["signatures"][0]["keyid"]):
        verify(sent(signed), [other.public_pem])


@pytest.mark.parametrize("at", [0, 100, -40])
def test_a_changed_payload_is_found_out(key: InstallationKey, signed: dict[str, Any], at: int):
    payload = bytearray(base64.b64decode(signed["payload"]))
    payload[at] ^= 1
    changed = {**signed, "payload": base64.b64encode(payload).decode()}

    with pytest.raises(NotVerified, match="was changed"):
        verify(sent(changed), [key.public_pem])


def test_a_signature_of_another_key_under_the_known_name_is_found_out(
    key: InstallationKey, other: InstallationKey
):
    forged = json.loads(other.sign(SAID))
    forged["signatures"][0]["keyid"] = key.id

    with pytest.raises(NotVerified, match="was changed"):
        verify(sent(forged), [key.public_pem])


def test_a_payload_of_another_type_is_not_read(key: InstallationKey, signed: dict[str, Any]):
    with pytest.raises(BadInput, match="holds 'text/plain'"):
        verify(sent({**signed, "payloadType": "text/plain"}), [key.public_pem])


def test_others_may_have_signed_it_as_well(
    key: InstallationKey, other: InstallationKey, signed: dict[str, Any]
):
    (theirs,) = json.loads(other.sign(SAID))["signatures"]
    both = {**signed, "signatures": [theirs, *signed["signatures"]]}

    assert verify(sent(both), [key.public_pem]) == SAID
    assert verify(sent(both), [key.public_pem, other.public_pem]) == SAID


def test_a_known_key_that_signed_another_is_not_outvoted(
    key: InstallationKey, other: InstallationKey, signed: dict[str, Any]
):
    (theirs,) = json.loads(other.sign(SAID))["signatures"]
    wrong = {**signed["signatures"][0], "sig": theirs["sig"]}

    with pytest.raises(NotVerified, match="was changed"):
        verify(sent({**signed, "signatures": [theirs, wrong]}), [key.public_pem, other.public_pem])


def test_two_signatures_in_one_name_are_refused(key: InstallationKey, signed: dict[str, Any]):
    twice = {**signed, "signatures": signed["signatures"] * 2}

    with pytest.raises(BadInput, match="same key"):
        verify(sent(twice), [key.public_pem])


def test_a_signature_without_a_name_is_tried_with_every_key(
    key: InstallationKey, other: InstallationKey, signed: dict[str, Any]
):
    """The name is a hint, by the protocol."""
    nameless = {**signed, "signatures": [{"sig": signed["signatures"][0]["sig"]}]}

    assert verify(sent(nameless), [other.public_pem, key.public_pem]) == SAID
    with pytest.raises(NotVerified, match="signed by nobody"):
        verify(sent(nameless), [other.public_pem])


def test_unsigned_is_not_signed(key: InstallationKey, signed: dict[str, Any]):
    with pytest.raises(NotVerified, match="nobody"):
        verify(sent({**signed, "signatures": []}), [key.public_pem])


def test_what_is_signed_but_no_statement_is_refused(key: InstallationKey):
    from securesystemslib.dsse import Envelope

    envelope = Envelope(b"[]", PAYLOAD_TYPE, {})
    envelope.sign(key._open()[0])

    with pytest.raises(BadInput, match="no statement"):
        verify(sent(envelope.to_dict()), [key.public_pem])


@pytest.mark.parametrize(
    "envelope",
    [
        b"",
        b"null",
        b"\xff\xfe",
        b"[" * 1_000_000,
        b'{"payload":' * 10_000,
        b'{"payload":1}',
        b'{"payload":"","payloadType":"application/vnd.in-toto+json"}',
        sent({"payload": "\ud800", "payloadType": PAYLOAD_TYPE, "signatures": []}),
        sent({"payload": "", "payloadType": "x" * 1000, "signatures": []}),
        sent({"payload": "", "payloadType": PAYLOAD_TYPE, "signatures": [{"sig": ""}] * 17}),
        sent({"payload": "é", "payloadType": PAYLOAD_TYPE, "signatures": [{"sig": ""}]}),
        sent({"payload": "=", "payloadType": PAYLOAD_TYPE, "signatures": [{"sig": ""}]}),
        sent({"payload": "", "payloadType": PAYLOAD_TYPE, "signatures": [{"sig": "?"}]}),
    ],
)  # fmt: skip
def test_what_is_no_envelope_is_refused_with_one_sentence(key: InstallationKey, envelope: bytes):
    with pytest.raises(BadInput, match=r"envelope"):
        verify(envelope, [key.public_pem])


def test_an_envelope_without_end_is_not_even_parsed(
    key: InstallationKey, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(signing, "ENVELOPE_BYTES_MAX", 100)

    with pytest.raises(BadInput, match="101 bytes"):
        verify(b"x" * 101, [key.public_pem])


@given(st.data())
@settings(max_examples=100)
def test_no_change_of_an_envelope_is_believed_or_breaks_anything(
    key: InstallationKey, signed: dict[str, Any], data: st.DataObject
):
    """Whatever byte is changed, lost or put in: it is refused, or still says the same."""
    whole = bytearray(sent(signed))
    at = data.draw(st.integers(0, len(whole) - 1))
    match data.draw(st.sampled_from(["change", "lose", "add"])):
        case "change":
            whole[at] = data.draw(st.integers(0, 255))
        case "lose":
            del whole[at]
        case _:
            whole.insert(at, data.draw(st.integers(0, 255)))
    try:
        found = verify(bytes(whole), [key.public_pem])
    except PlatformError:
        return

    assert found == SAID


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"\xff",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        b"x" * 100_000,
    ],
)
def test_what_is_no_public_key_is_refused(signed: dict[str, Any], pem: bytes):
    with pytest.raises(BadInput, match="no public key"):
        verify(sent(signed), [pem])


def test_a_public_key_of_another_kind_is_refused(signed: dict[str, Any]):
    pem = (
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )

    with pytest.raises(BadInput, match="Ed25519"):
        verify(sent(signed), [pem])


def test_without_a_key_nothing_is_believed(signed: dict[str, Any]):
    with pytest.raises(BadInput, match="0 public keys"):
        verify(sent(signed), [])


def test_the_private_key_is_in_nothing_that_is_said(
    key: InstallationKey, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    private = serialization.load_pem_private_key(
        (key._folder / "signing-key.pem").read_bytes(), None
    )
    raw = private.private_bytes(
        serialization.Encoding.Raw,
        serialization.PrivateFormat.Raw,
        serialization.NoEncryption(),
    )
    said = key.sign(SAID) + key.public_pem + repr(key).encode() + caplog.text.encode()

    for form in (raw, raw.hex().encode(), base64.b64encode(raw)[:40]):
        assert form not in said


# ---- with openssl alone -------------------------------------------------------------------------


def recipe() -> str:
    """The first shell block of the page that has `openssl pkeyutl` in it."""
    page = (ROOT / "docs" / "provenance.md").read_text()
    blocks = [part.partition("```")[0] for part in page.split("```sh\n")[1:]]
    return next(block for block in blocks if "openssl pkeyutl" in block)


def verified_by_hand(folder: Path, envelope: bytes, pem: bytes) -> subprocess.CompletedProcess[str]:
    (folder / "provenance.json").write_bytes(envelope)
    (folder / "key.pem").write_bytes(pem)
    return subprocess.run(
        ["/bin/sh", "-e", "-c", recipe()],
        cwd=folder,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_the_page_says_how_openssl_verifies_it(key: InstallationKey, tmp_path: Path):
    """Literally: what is printed there is what is run here."""
    done = verified_by_hand(tmp_path, key.sign(SAID), key.public_pem)

    assert (done.returncode, done.stderr) == (0, "")
    assert "Signature Verified Successfully" in done.stdout
    assert key.id in done.stdout
    assert (tmp_path / "statement.json").read_bytes() == provenance.encode(SAID)


def test_openssl_refuses_what_was_changed_or_signed_by_another(
    key: InstallationKey, other: InstallationKey, signed: dict[str, Any], tmp_path: Path
):
    payload = base64.b64encode(provenance.encode(SAID).replace(b"Succeeded", b"Succeedee"))
    changed = verified_by_hand(
        tmp_path, sent({**signed, "payload": payload.decode()}), key.public_pem
    )
    foreign = verified_by_hand(tmp_path, sent(signed), other.public_pem)

    for done in (changed, foreign):
        assert done.returncode != 0
        assert "Successfully" not in done.stdout
