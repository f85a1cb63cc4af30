"""Verified or not used: whatever happens to a byte of a checkpoint, it is noticed, named, and
skipped for the next older one."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from sealing import seal
from there import there

from harness import cli
from harness.checkpoint import attempts, load, resume
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import read_catalog
from harness.checkpoint.commit import About, commit
from harness.checkpoint.format import Manifest
from harness.errors import DamagedError, StorageError, UsageError
from harness.store import LocalStore

NOBODY = 65534
STEPS = (10, 20, 30)
NEWEST = fmt.stem(30, 1)


def payload(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "model_state_dict": {"weight": torch.randn(20, 10, generator=generator)},
        "step": step,
        "epoch": 0,
        "loss": 1 / step,
        "metrics": {"val_loss": 1 / step},
        "config": {},
        "format_version": 1,
    }


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = LocalStore(tmp_path_factory.mktemp("template") / "run")
    store.prepare(fmt.FOLDERS)
    attempt = attempts.claim(read_catalog(store), None, 1)
    for step in STEPS:
        commit(store, attempt, payload(step), About(1, (), {"model": "Linear"}, "-"))
    return store.root


@pytest.fixture
def store(template: Path, tmp_path: Path) -> LocalStore:
    """A run with three good checkpoints of one attempt."""
    shutil.copytree(template, tmp_path / "run")
    return LocalStore(tmp_path / "run")


def manifest_of(store: LocalStore, step: int = 30) -> Manifest:
    return next(m for m in read_catalog(store).manifests if m.step == step)


def data_path(store: LocalStore, step: int = 30) -> Path:
    return store.path(fmt.data_key(step, 1))


def manifest_path(store: LocalStore, step: int = 30) -> Path:
    return store.path(fmt.manifest_key(step, 1))


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def forge(store: LocalStore, step: int, data: bytes) -> Manifest:
    """Any bytes as the data of a checkpoint whose manifest fits them."""
    file = fmt.DataFile(f"{fmt.stem(step, 1)}.pt", len(data), f"blake3:{blake3(data).hexdigest()}")
    manifest = dataclasses.replace(
        manifest_of(store), step=step, lineage=((1, step),), files=(file,)
    )
    data_path(store, step).write_bytes(data)
    manifest_path(store, step).write_bytes(fmt.to_bytes(manifest))
    return manifest


def tree(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def check_named(
    store: LocalStore, capsys: pytest.CaptureFixture[str], name: str, path: Path | None = None
) -> None:
    """`harness verify` exits 1 and names that checkpoint, and that one only."""
    capsys.readouterr()
    assert cli.main(["verify", str(path or store.root)]) == 1
    captured = capsys.readouterr()
    bad = [
        line
        for line in (captured.out + captured.err).splitlines()
        if not line.startswith(("ok ", "note "))
    ]
    assert name in " ".join(bad), captured
    assert "Traceback" not in captured.err
    if path is None:
        fine = {line.split()[1] for line in captured.out.splitlines() if line.startswith("ok ")}
        assert fine == {fmt.stem(step, 1) for step in STEPS} - {name}


# --- what is whole passes ---


def test_what_is_whole_is_loaded_and_verifies(store, capsys):
    for step in STEPS:
        loaded = load.load(store, manifest_of(store, step))
        assert torch.equal(
            loaded["model_state_dict"]["weight"], payload(step)["model_state_dict"]["weight"]
        )
    for path in (store.root, data_path(store), manifest_path(store)):
        assert cli.main(["verify", str(path)]) == 0
        assert f"ok       {NEWEST}" in capsys.readouterr().out


def test_the_data_opens_with_nothing_but_torch(store):
    assert torch.load(data_path(store), weights_only=True)["step"] == 30


# --- the data file ---


def regions(path: Path) -> dict[str, int]:
    """One byte of each region of a zip file."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.split("/", 1)[1]: info for info in archive.infolist()}
        central = archive.start_dir

    def inside(info: zipfile.ZipInfo) -> int:
        name, extra = (
            int.from_bytes(data[info.header_offset + at : info.header_offset + at + 2], "little")
            for at in (26, 28)
        )
        return info.header_offset + 30 + name + extra + info.file_size // 2

    return {
        "first byte": 0,
        "local header": members["data.pkl"].header_offset + 8,
        "name in the local header": members["data.pkl"].header_offset + 32,
        "pickle": inside(members["data.pkl"]),
        "padding": inside(members["data/0"]) - members["data/0"].file_size // 2 - 1,
        "tensor data": inside(members["data/0"]),
        "crc in the central directory": central + 16,
        "offset in the central directory": central + 42,
        "end record": len(data) - 10,
        "last byte": len(data) - 1,
    }


def test_a_flipped_bit_in_any_region_of_the_data_is_caught_and_named(store, capsys):
    whole = data_path(store).read_bytes()
    for region, at in regions(data_path(store)).items():
        for bit in (0, 7):
            flip(data_path(store), at, bit)
            with pytest.raises(DamagedError, match=NEWEST):
                load.load(store, manifest_of(store))
                pytest.fail(region)
            check_named(store, capsys, NEWEST)
            check_named(store, capsys, NEWEST, data_path(store))
            data_path(store).write_bytes(whole)
    assert cli.main(["verify", str(store.root)]) == 0


def test_a_flipped_bit_in_any_byte_of_the_data_is_caught(store):
    manifest, whole = manifest_of(store), data_path(store).read_bytes()
    for at in range(len(whole)):
        flip(data_path(store), at, at % 8)
        with pytest.raises(DamagedError):
            load.verified(store, manifest.data)
        data_path(store).write_bytes(whole)
    load.verified(store, manifest.data).close()


def test_data_that_is_cut_short_at_any_length_is_caught(store, capsys):
    manifest, whole = manifest_of(store), data_path(store).read_bytes()
    lengths = sorted(
        {*range(0, len(whole), 97), 1, 4, 22, len(whole) // 2, len(whole) - 22, len(whole) - 1}
    )
    for length in lengths:
        data_path(store).write_bytes(whole[:length])
        with pytest.raises(DamagedError, match="wrong size"):
            load.load(store, manifest)
    for length in (0, len(whole) - 1):
        data_path(store).write_bytes(whole[:length])
        check_named(store, capsys, NEWEST)


def grown(data: bytes) -> bytes:
    return data + b"\0"


def holed(data: bytes) -> bytes:
    return data[:512] + bytes(512) + data[1024:]


def all_zero(data: bytes) -> bytes:
    return bytes(len(data))


def swapped(data: bytes) -> bytes:
    return data[:512] + data[1024:1536] + data[512:1024] + data[1536:]


@pytest.mark.parametrize("damage", [grown, holed, all_zero, swapped])
def test_data_that_is_not_what_was_written_is_caught_and_named(store, capsys, damage):
    whole = data_path(store).read_bytes()
    data_path(store).write_bytes(damage(whole))
    assert data_path(store).read_bytes() != whole
    with pytest.raises(DamagedError, match=NEWEST):
        load.load(store, manifest_of(store))
    check_named(store, capsys, NEWEST)


def test_data_of_another_step_in_its_place_is_caught(store, capsys):
    shutil.copy(data_path(store, 20), data_path(store, 30))
    with pytest.raises(DamagedError, match=NEWEST):
        load.load(store, manifest_of(store))
    check_named(store, capsys, NEWEST)


def test_whole_data_that_speaks_of_another_step_than_its_manifest_is_caught(store):
    manifest = forge(store, 40, data_path(store, 20).read_bytes())
    with pytest.raises(DamagedError, match="not the checkpoint that its manifest describes"):
        load.load(store, manifest)


def test_missing_data_is_caught_and_named(store, capsys):
    data_path(store).unlink()
    with pytest.raises(DamagedError, match=f"{NEWEST}.pt is missing"):
        load.load(store, manifest_of(store))
    check_named(store, capsys, NEWEST)


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_data_that_is_no_regular_file_is_not_used(store, capsys, tmp_path, kind):
    manifest = manifest_of(store)
    os.rename(data_path(store), tmp_path / "elsewhere.pt")
    if kind == "link":  # though what it leads to has the right digest
        data_path(store).symlink_to(tmp_path / "elsewhere.pt")
    elif kind == "folder":
        data_path(store).mkdir()
    else:
        os.mkfifo(data_path(store))
    with pytest.raises(DamagedError, match=NEWEST):
        load.load(store, manifest)
    check_named(store, capsys, NEWEST)


# --- the manifest ---


def test_every_bit_of_a_manifest_counts(store):
    key, whole = fmt.manifest_key(30, 1), manifest_path(store).read_bytes()
    assert fmt.from_bytes(key, whole) == manifest_of(store)
    for at in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            with pytest.raises(DamagedError, match=NEWEST):
                fmt.from_bytes(key, bytes(damaged))
                pytest.fail(f"byte {at}, bit {bit}: {bytes(damaged)!r}")


def test_a_manifest_that_is_cut_short_or_grown_is_damaged(store):
    key, whole = fmt.manifest_key(30, 1), manifest_path(store).read_bytes()
    for text in [
        *(whole[:length] for length in range(len(whole))),
        whole + b"\n",
        whole + b" ",
        b"\n" + whole,
        whole + b"\0",
        whole * 2,
    ]:
        with pytest.raises(DamagedError, match=NEWEST):
            fmt.from_bytes(key, text)


def test_a_manifest_that_says_the_same_in_another_spelling_is_damaged(store):
    fields = json.loads(manifest_path(store).read_bytes())
    backwards = dict(reversed(fields.items()))
    for text in (
        json.dumps(fields).encode(),
        json.dumps(fields, indent=2).encode(),
        json.dumps(backwards, indent=1).encode() + b"\n",
    ):
        with pytest.raises(DamagedError):
            fmt.from_bytes(fmt.manifest_key(30, 1), text)


def test_a_damaged_manifest_is_named_whatever_part_of_it_is_hit(store, capsys):
    whole = manifest_path(store).read_bytes()
    places = [
        0,
        1,
        whole.index(b'"attempt"') + 3,
        whole.index(b'"step": ') + 8,
        whole.index(b'"manifest_digest"') + 30,
        len(whole) - 1,
    ]
    for at in places:
        flip(manifest_path(store), at, 1)
        found = read_catalog(store)
        assert list(found.damaged) == [fmt.manifest_key(30, 1)] and [
            m.step for m in found.manifests
        ] == [10, 20]
        check_named(store, capsys, NEWEST)
        check_named(store, capsys, NEWEST, data_path(store))
        manifest_path(store).write_bytes(whole)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b"{}",
        b'"x"',
        b"\xff\xfe",
        bytes(700),
        b"{" * 100_000,
        b'{"a":' * 20_000,
    ],
)
def test_what_is_no_manifest_at_all_is_damaged(store, capsys, text):
    manifest_path(store).write_bytes(text)
    assert list(read_catalog(store).damaged) == [fmt.manifest_key(30, 1)]
    check_named(store, capsys, NEWEST)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "files": [
                {
                    "name": "../x",
                    "size_bytes": 6,
                    "digest": f"blake3:{blake3(b'secret').hexdigest()}",
                }
            ]
        },
        {"files": [{"name": "/etc/passwd", "size_bytes": 6, "digest": "blake3:"}]},
        {"files": [{"name": f"{fmt.stem(20, 1)}.pt", "size_bytes": 6, "digest": "blake3:"}]},
        {"files": []},
        {"files": None},
        {"files": [{"name": f"{NEWEST}.pt"}]},
        {"step": 31},
        {"attempt": 2},
        {"lineage": []},
        {"lineage": [[1, 40]]},
        {"lineage": [[1]]},
        {"lineage": "x"},
    ],
    ids=lambda changes: json.dumps(changes)[:30],
)
def test_a_sealed_manifest_that_speaks_of_something_else_is_damaged(store, capsys, changes):
    (store.root / "x").write_bytes(b"secret")
    manifest_path(store).write_bytes(seal(json.loads(manifest_path(store).read_bytes()) | changes))
    found = read_catalog(store)
    assert list(found.damaged) == [fmt.manifest_key(30, 1)]
    assert there(found.head).step == 20
    check_named(store, capsys, NEWEST)
    assert (store.root / "x").read_bytes() == b"secret"


def test_a_manifest_under_another_name_is_damaged(store, capsys):
    shutil.copy(manifest_path(store, 30), manifest_path(store, 40))
    shutil.copy(data_path(store, 30), data_path(store, 40))
    assert list(read_catalog(store).damaged) == [fmt.manifest_key(40, 1)]
    assert there(read_catalog(store).head).step == 30


def test_a_field_that_is_not_known_is_ignored(store):
    manifest_path(store).write_bytes(
        seal(json.loads(manifest_path(store).read_bytes()) | {"surplus": 1})
    )
    assert there(read_catalog(store).head).step == 30


def test_a_manifest_of_a_later_format_refuses_a_start_and_is_not_set_aside(store, world, capsys):
    later = json.loads(manifest_path(store).read_bytes()) | {
        "format_version": 99,
        "shards": {"of": "a later version"},
    }
    manifest_path(store).write_bytes(seal(later))
    found = read_catalog(store)
    assert list(found.newer) == [fmt.manifest_key(30, 1)] and not found.damaged
    with pytest.raises(UsageError, match="format version 99"):
        resume.choose(store, world)
    assert manifest_path(store).exists()


def test_a_later_format_with_a_flipped_bit_is_damaged(store):
    later = seal(json.loads(manifest_path(store).read_bytes()) | {"format_version": 99})
    manifest_path(store).write_bytes(later.replace(b'"epoch": 0', b'"epoch": 1'))
    found = read_catalog(store)
    assert list(found.damaged) == [fmt.manifest_key(30, 1)] and not found.newer


# --- what does not belong there ---

FOREIGN = (
    f"{NEWEST}.pt.bak",
    f"{NEWEST}.json~",
    f"x{NEWEST}.json",
    "step_120-3.pt",
    "step_00000040-0001.PT",
    "step_00000040-0001.json\n",
    "step_٠٠٠٠٠٠٤٠-٠٠٠١.json",
    "step_0000004x-0001.json",
    "step_00000040-1.json",
    "step_-0000040-0001.json",
    "latest",
    ".nfs0000",
)


def test_foreign_files_are_named_and_neither_used_nor_counted_as_damage(store, world, capsys):
    for name in FOREIGN:
        shutil.copy(manifest_path(store), store.root / fmt.CHECKPOINTS / name)
    (store.root / fmt.CHECKPOINTS / "step_00000050-0001.json").symlink_to(manifest_path(store))
    (store.root / fmt.CHECKPOINTS / "step_00000060-0001.json").mkdir()
    found = read_catalog(store)
    assert sorted(found.foreign) == sorted(f"{fmt.CHECKPOINTS}/{name}" for name in FOREIGN)
    assert [m.step for m in found.manifests] == list(STEPS) and not found.damaged
    resume_point = resume.choose(store, world)
    assert there(resume_point.manifest).step == 30 and resume_point.damaged == []
    assert all(
        any(" ".join(name.split()) in note for note in resume_point.notes) for name in FOREIGN
    )
    assert cli.main(["verify", str(store.root)]) == 0
    assert cli.main(["ls", str(store.root)]) == 0
    assert f"{NEWEST}.pt.bak" in capsys.readouterr().out


# --- nothing from outside is executed ---


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def as_zip(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def as_legacy(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("spell", [as_zip, as_legacy, pickle.dumps])
def test_a_pickle_that_would_run_code_is_refused_though_its_digest_fits(
    store, world, capsys, tmp_path, spell
):
    data = spell(payload(40) | {"rng": Canary(tmp_path / "canary")})
    if spell is not pickle.dumps:
        torch.load(io.BytesIO(data), weights_only=False)
        os.rmdir(tmp_path / "canary")  # it would have worked
    manifest = forge(store, 40, data)
    with pytest.raises(DamagedError, match="cannot be parsed"):
        load.load(store, manifest)
    assert there(resume.choose(store, world).manifest).step == 30
    check_named_among(store, capsys, fmt.stem(40, 1))
    cli.main(["show", str(data_path(store, 40))])
    assert not (tmp_path / "canary").exists()


def check_named_among(store: LocalStore, capsys: pytest.CaptureFixture[str], name: str) -> None:
    capsys.readouterr()
    assert cli.main(["verify", str(store.root)]) == 1
    assert f"DAMAGED  {name}" in capsys.readouterr().out


def with_pickle(store: LocalStore, change: Callable[[bytes], bytes]) -> bytes:
    """The newest checkpoint's file with another pickle in it."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(data_path(store)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new,
    ):
        for name in old.namelist():
            new.writestr(
                name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name)
            )
    return buffer.getvalue()


def test_data_that_cannot_be_parsed_is_damage_in_words_though_its_digest_fits(store, world, capsys):
    """Somebody else's file, or a bug of the writer: never a traceback, and the next older one is
    taken."""
    with zipfile.ZipFile(data_path(store)) as archive:
        length = len(
            archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        )
    cases = [
        b"",
        b"x",
        b"\x80\x02",
        b"PK\x03\x04",
        pickle.dumps([1]),
        as_zip([1, 2]),
        as_zip(payload(41)),
    ]
    cases += [with_pickle(store, itemgetter(slice(end))) for end in range(0, length, 3)]
    wrong = []
    for data in cases:
        manifest = forge(store, 40, data)
        try:
            load.load(store, manifest)
            wrong.append(f"{data[:20]!r}: loaded")
        except DamagedError:
            pass
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            wrong.append(f"{len(data)} bytes, {data[:12]!r}: {type(error).__name__}: {error}")
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:12])
    assert there(resume.choose(store, world).manifest).step == 30


# --- which one is chosen ---


def test_the_newest_is_chosen_and_nothing_is_written(store, world):
    before = tree(store.root)
    resume_point = resume.choose(store, world)
    assert there(resume_point.manifest).step == 30 and there(resume_point.payload)["step"] == 30
    assert resume_point.damaged == [] and resume_point.notes == []
    assert tree(store.root) == before


@pytest.mark.parametrize("kind", ["data", "manifest", "missing"])
def test_a_damaged_newest_is_passed_over_loudly_for_the_next_older_and_marked_to_be_set_aside(
    store, world, kind
):
    if kind == "missing":
        data_path(store).unlink()
    else:
        flip(data_path(store) if kind == "data" else manifest_path(store), 300)
    before = tree(store.root)
    resume_point = resume.choose(store, world)
    assert there(resume_point.manifest).step == 20
    assert torch.equal(
        there(resume_point.payload)["model_state_dict"]["weight"],
        payload(20)["model_state_dict"]["weight"],
    )
    assert resume_point.damaged == [(0, fmt.manifest_key(30, 1))]
    assert any("skipped" in note and NEWEST in note for note in resume_point.notes)
    assert tree(store.root) == before, "finding only reads"


def test_two_damaged_ones_are_passed_over_for_the_third(store, world):
    flip(data_path(store, 30), 100)
    flip(data_path(store, 20), 100)
    resume_point = resume.choose(store, world)
    assert there(resume_point.manifest).step == 10
    assert resume_point.damaged == [(0, fmt.manifest_key(30, 1)), (0, fmt.manifest_key(20, 1))]
    assert len(resume_point.notes) == 2


@pytest.mark.parametrize("kind", ["data", "manifest", "missing"])
def test_if_everything_is_damaged_there_is_no_fresh_start(store, world, kind):
    for step in STEPS:
        if kind == "missing":
            data_path(store, step).unlink()
        else:
            flip(data_path(store, step) if kind == "data" else manifest_path(store, step), 300)
    before = tree(store.root)
    with pytest.raises(DamagedError, match="not starting from step 0") as caught:
        resume.choose(store, world)
    assert all(fmt.stem(step, 1) in str(caught.value) for step in STEPS)
    assert tree(store.root) == before


def test_what_is_set_aside_is_kept_counts_no_more_and_still_forbids_a_fresh_start(
    store, world, capsys
):
    for step in STEPS:
        resume.set_aside(store, fmt.manifest_key(step, 1))
        assert (
            not data_path(store, step).exists()
            and data_path(store, step).with_name(f"{fmt.stem(step, 1)}.pt.damaged").exists()
        )
    found = read_catalog(store)
    assert found.manifests == [] and found.orphans == [] and len(found.set_aside) == 6
    assert cli.main(["verify", str(store.root)]) == 0
    assert capsys.readouterr().out.count("set aside") == 6
    with pytest.raises(DamagedError, match="not starting from step 0"):
        resume.choose(store, world)
    for path in (store.root / fmt.ATTEMPTS).iterdir():
        path.unlink()
    with pytest.raises(DamagedError, match="not starting from step 0"):
        resume.choose(store, world)


def test_setting_aside_takes_the_manifest_away_first(store):
    """Dying in between leaves data without a manifest, which is no checkpoint; the other way round
    it would be half a one."""
    blocked = store.path(f"{fmt.data_key(30, 1)}.damaged")
    (blocked / "in the way").mkdir(parents=True)
    with pytest.raises(StorageError):
        resume.set_aside(store, fmt.manifest_key(30, 1))
    assert not manifest_path(store).exists() and data_path(store).exists()
    assert there(read_catalog(store).head).step == 20


def test_setting_aside_what_is_gone_already_is_fine(store):
    data_path(store).unlink()
    resume.set_aside(store, fmt.manifest_key(30, 1))
    resume.set_aside(store, fmt.manifest_key(30, 1))
    assert read_catalog(store).set_aside == [f"{fmt.manifest_key(30, 1)}.damaged"]
    assert there(read_catalog(store).head).step == 20


def test_if_only_later_formats_are_there_is_no_fresh_start(store, world):
    for step in STEPS:
        later = seal(json.loads(manifest_path(store, step).read_bytes()) | {"format_version": 99})
        manifest_path(store, step).write_bytes(later)
    with pytest.raises(UsageError, match="format version 99"):
        resume.choose(store, world)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Whoever runs the tests: here permissions apply."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_store(template: Path) -> Iterator[LocalStore]:
    """The same run where everybody may pass; pytest's own folders belong to their user alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(template, f"{folder}/run")
        yield LocalStore(f"{folder}/run")


def test_what_cannot_be_read_is_not_called_damaged(open_store, world):
    os.chmod(data_path(open_store), 0)
    with as_nobody(), pytest.raises(StorageError, match="cannot be read") as refused:
        # it may be whole, and going on from an older one would cut it off
        resume.choose(open_store, world)
    assert "Permission denied" in str(refused.value) and NEWEST in str(refused.value)
    assert read_catalog(open_store).set_aside == []


@pytest.mark.parametrize("folder", [fmt.CHECKPOINTS, fmt.ATTEMPTS])
def test_a_store_that_cannot_be_listed_is_never_a_fresh_start(open_store, world, folder):
    os.chmod(open_store.root / folder, 0)
    try:
        with as_nobody(), pytest.raises(StorageError, match=folder):
            resume.choose(open_store, world)
        shutil.rmtree(open_store.root / fmt.CHECKPOINTS)
        (open_store.root / fmt.CHECKPOINTS).write_bytes(b"")
        with pytest.raises(StorageError, match=fmt.CHECKPOINTS):
            resume.choose(open_store, world)
    finally:
        os.chmod(open_store.root / folder, 0o755)
