"""Thousands of damaged folders: each ends in our own error, and none in another network."""

import json

import numpy as np
import pytest

import ait_jax
from ait_jax.errors import UserError
from ait_jax.export import read_artefact, write_artefact
from ait_jax.export.checked_files import TENSORS
from ait_jax.export.manifest import MANIFEST
from tests.support.artefacts import EVERY_BIT_WIDTH, network, rewrite
from tests.support.saved_results import rounded_result
from tests.support.user_models import PLAIN, Plain

FILES = (MANIFEST, TENSORS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "saved"
    rounded_result(Plain(), PLAIN).save(folder)
    return folder, lambda path: ait_jax.load_result(path, Plain())


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "artefact"
    write_artefact(network("cifar_resnet8_b", (8, 8, 1), 10, **EVERY_BIT_WIDTH)[0], folder, str)
    return folder, lambda path: read_artefact(path).network()


@pytest.fixture(params=["saved", "artefact"])
def written(request):
    return request.getfixturevalue(request.param)


# What happens to files ----------------------------------------------------------------------------


def flipped(data, rng):
    at = rng.integers(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.integers(8))]) + data[at + 1 :]


def overwritten(data, rng):
    """A byte is another one, often one that text may well have there."""
    at, likely = rng.integers(len(data)), b' \n\t0123456789[]{}",:'
    value = likely[rng.integers(len(likely))] if rng.random() < 0.5 else rng.integers(256)
    return data[:at] + bytes([value]) + data[at + 1 :]


def truncated(data, rng):
    return data[: rng.integers(len(data))]


def longer(data, rng):
    return data + rng.bytes(rng.integers(1, 20))


def cut_out(data, rng):
    start, end = sorted(rng.integers(len(data) + 1, size=2))
    return data[:start] + data[end:]


def overlaid(data, rng):
    """Blocks change places, as on a disk."""
    size = rng.integers(1, max(2, len(data) // 4))
    a, b = rng.integers(len(data) - size + 1, size=2)
    moved = bytearray(data)
    moved[a : a + size], moved[b : b + size] = data[b : b + size], data[a : a + size]
    return bytes(moved)


def zeroed(data, rng):
    start, end = sorted(rng.integers(len(data) + 1, size=2))
    return data[:start] + bytes(end - start) + data[end:]


DAMAGES = (flipped, overwritten, truncated, longer, cut_out, overlaid, zeroed)


def test_bytes_that_changed(written, tmp_path):
    folder, read = written
    original = {name: (folder / name).read_bytes() for name in FILES}
    done = 0
    for seed in range(2300):
        rng = np.random.default_rng(seed)
        name, damage = FILES[rng.integers(2)], DAMAGES[rng.integers(len(DAMAGES))]
        data = damage(original[name], rng)
        if data == original[name]:
            continue
        for file in FILES:
            (tmp_path / file).write_bytes(data if file == name else original[file])
        with pytest.raises(UserError) as error:  # And nothing else is raised.
            read(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value), (seed, damage)
        done += 1
    assert done > 2000


def test_tensors_that_changed_places(written, tmp_path):
    """Names of one size are exchanged in the header: a valid file of another network."""
    folder, read = written
    data = (folder / TENSORS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    alike = [
        (a, b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if header[a]["dtype"] == header[b]["dtype"] and header[a]["shape"] == header[b]["shape"]
    ]
    (tmp_path / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    refused = 0
    for a, b in alike[:200]:
        places = [slice(*header[name]["data_offsets"]) for name in (a, b)]
        if data[8 + size :][places[0]] == data[8 + size :][places[1]]:
            continue
        swapped = header | {a: header[b], b: header[a]}
        text = json.dumps(swapped, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        whole = len(text).to_bytes(8, "little") + text + data[8 + size :]
        (tmp_path / TENSORS).write_bytes(whole)
        with pytest.raises(UserError, match=r"checksum"):
            read(tmp_path)
        refused += 1
    assert refused > 2


WILD = (None, True, -1, 0, 3, 2**40, 10**400, 1.5, float("nan"), "", "x", [], [[]], {}, {"a": 1})


def places(value, prefix=()):
    """The paths of all values inside a JSON value, but for what nobody reads."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if key in ("histogram", "config", "summary", "versions", "sha256"):
            continue
        yield (*prefix, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*prefix, key))


def test_manifests_that_say_something_else(written, tmp_path):
    """Written by somebody who knows the checksums: it is refused, or nobody reads what changed."""
    folder, read = written
    text = (folder / MANIFEST).read_text()
    every = list(places(json.loads(text)))
    (tmp_path / TENSORS).write_bytes((folder / TENSORS).read_bytes())
    refused = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        *parents, last = every[rng.integers(len(every))]
        manifest = json.loads(text)
        inside = manifest
        for part in parents:
            inside = inside[part]
        if rng.random() < 0.3:
            del inside[last]
        else:
            inside[last] = WILD[rng.integers(len(WILD))]
        rewrite(tmp_path, manifest)
        try:
            read(tmp_path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 130
