"""The file of choices: found again, merged, never trusted, never in the way."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import warnings
from pathlib import Path

import choice_cases as cases
import pytest
from choice_cases import FINGERPRINT, KEY

from odysseus_kernels.comm.choice import cache as choice_cache
from odysseus_kernels.comm.choice.cache import CachedChoice, ChoiceCache, machine_fingerprint

CHOICE = CachedChoice("fused", {"unfused": 2.0, "fused": 1.0})


def contents(choices: object, fingerprint: object = FINGERPRINT) -> str:
    return json.dumps({"fingerprint": fingerprint, "choices": choices})


def test_found_again(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "here"
    cache = ChoiceCache(directory, FINGERPRINT)
    assert cache.get(KEY.text) is None and not directory.exists()
    cache.put(KEY.text, CHOICE)
    assert cache.get(KEY.text) == CHOICE
    later = ChoiceCache(directory, FINGERPRINT)
    assert later.get(KEY.text) == CHOICE and later.get("another") is None
    assert json.loads(cache.path.read_text())["choices"][KEY.text]["mode"] == "fused"


def test_other_machines_have_other_files(tmp_path: Path) -> None:
    ChoiceCache(tmp_path, FINGERPRINT).put("key", CHOICE)
    for name in FINGERPRINT:
        other = ChoiceCache(tmp_path, {**FINGERPRINT, name: "other"})
        assert other.path != ChoiceCache(tmp_path, FINGERPRINT).path
        assert other.get("key") is None


def test_fingerprint() -> None:
    versions = {"package_version": "0.1.0", "torch_version": "2.13.0", "triton_version": "3.7.1"}
    found = machine_fingerprint(["GPU A", "GPU B"], **versions)
    assert found == machine_fingerprint(["GPU A", "GPU B"], **versions)
    assert found["devices"] == "GPU A, GPU B" and found["processor"] and int(found["cores"]) >= 1
    changed = [machine_fingerprint(["GPU A"], **versions)]
    changed += [machine_fingerprint(["GPU A", "GPU B"], **{**versions, name: "9"}) for name in versions]
    assert all(one != found for one in changed)


def test_writers_do_not_lose_each_others_choices(tmp_path: Path) -> None:
    """Both have read the file before either writes."""
    first, second = (ChoiceCache(tmp_path, FINGERPRINT) for _ in range(2))
    assert first.get("a") is None and second.get("a") is None
    first.put("a", CHOICE)
    second.put("b", CHOICE)
    first.put("shared", CHOICE)
    last = CachedChoice("unfused", {"unfused": 1.0})
    second.put("shared", last)
    later = ChoiceCache(tmp_path, FINGERPRINT)
    assert [later.get(key) for key in ("a", "b", "shared")] == [CHOICE, CHOICE, last]


@pytest.mark.without_ranks
def test_many_processes_write(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=cases.write_choices, args=(tmp_path, number, 25)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(100)
        assert writer.exitcode == 0
    cache = ChoiceCache(tmp_path, FINGERPRINT)
    for writer_number in range(3):
        for number in range(25):
            expected = CachedChoice("fused", {"fused": 1.0 + writer_number, "unfused": 2.0})
            assert cache.get(f"{writer_number}-{number}") == expected
    assert sorted(os.listdir(tmp_path)) == sorted([cache.path.name, cache.path.with_suffix(".lock").name])


@pytest.mark.parametrize(
    "text",
    (
        "",
        "{",
        "[]",
        "\udcff",
        "[" * 100_000,
        contents({}, {"schema": "0"}),
        contents([]),
        contents({"key": "fused"}),
        contents({"key": {"mode": "fused"}}),
        contents({"key": {"mode": "fused", "seconds": {"unfused": 1.0}}}),
        contents({"key": {"mode": ["fused"], "seconds": {"fused": 1.0}}}),
        contents({"key": {"mode": "fused", "seconds": {"fused": "1.0"}}}),
        contents({"key": {"mode": "fused", "seconds": {"fused": -1.0}}}),
        contents({"key": {"mode": "fused", "seconds": {"fused": float("nan")}}}),
        contents({"key": {"mode": "fused", "seconds": {"fused": True}}}),
    ),
    ids=str.__len__,
)
def test_files_of_something_else_are_replaced(tmp_path: Path, text: str) -> None:
    cache = ChoiceCache(tmp_path, FINGERPRINT)
    cache.path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="will be replaced"):
        assert cache.get("key") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough, and the file is in order afterwards
        cache.put("key", CHOICE)
        assert cache.get("key") == CHOICE
        assert ChoiceCache(tmp_path, FINGERPRINT).get("key") == CHOICE


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ChoiceCache(tmp_path, FINGERPRINT).put("key", CHOICE)
    monkeypatch.setattr(choice_cache, "_LARGEST_BYTES", 10)
    with pytest.warns(UserWarning, match="expected at most 10 bytes, got"):
        assert ChoiceCache(tmp_path, FINGERPRINT).get("key") is None


@pytest.mark.parametrize("place", ("a file", "a folder for the file"))
def test_places_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    """Not by permissions, which do not bind root: a file stands where the folder should be, or the reverse."""
    directory = tmp_path / "folder"
    cache = ChoiceCache(directory, FINGERPRINT)
    if place == "a file":
        directory.write_text("")
    else:
        cache.path.mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be"):
        cache.put("key", CHOICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        cache.put("key 2", CHOICE)
    assert cache.get("key") == cache.get("key 2") == CHOICE
    if directory.is_dir():
        assert not [name for name in os.listdir(directory) if name.startswith(".")]


def test_a_lock_that_is_never_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_cache, "_LOCK_LIMIT_S", 0.05)
    cache = ChoiceCache(tmp_path, FINGERPRINT)
    with cache.path.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match="was locked for"):
            cache.put("key", CHOICE)
    assert cache.get("key") == CHOICE and not cache.path.exists()
    cache.put("key", CHOICE)
    assert ChoiceCache(tmp_path, FINGERPRINT).get("key") == CHOICE


def test_equal_choices_are_written_once(tmp_path: Path) -> None:
    ChoiceCache(tmp_path, FINGERPRINT).put("key", CHOICE)
    cache = ChoiceCache(tmp_path, FINGERPRINT)
    before = cache.path.stat().st_ino
    cache.put("key", CHOICE)
    assert cache.path.stat().st_ino == before
    cache.put("key", CachedChoice("unfused", {"unfused": 1.0}))
    assert cache.path.stat().st_ino != before
