"""Locations: paths and URIs alike."""

from __future__ import annotations

import pickle

import pytest

from pipeline.errors import UserError
from pipeline.storage import Location, local_copy


def test_location_of_a_path_and_of_its_uri_are_the_same_place(tmp_path):
    by_path, by_uri = Location.parse(tmp_path), Location.parse(tmp_path.as_uri())
    assert by_path.path == by_uri.path
    assert by_path.is_local
    assert by_uri.is_local


def test_location_travels_to_another_process(tmp_path):
    location = Location.parse(tmp_path) / "a"
    assert pickle.loads(pickle.dumps(location)) == location


def test_location_write_replaces_whole_files_and_leaves_nothing_beside(tmp_path):
    file = Location.parse(tmp_path) / "deep" / "file.json"
    file.write_json({"a": 1})
    file.write_json({"a": "ü"})
    assert file.read_json() == {"a": "ü"}
    assert [child.name for child in file.parent.children()] == ["file.json"]


def test_location_upload_and_download_copy_a_folder(tmp_path):
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "x.bin").write_bytes(b"\x00\x01")
    target = Location.parse(tmp_path / "target")
    target.upload(source)
    copied = target.download(tmp_path / "copy")
    assert (copied / "inner" / "x.bin").read_bytes() == b"\x00\x01"
    assert local_copy(target, tmp_path / "cache") == tmp_path / "target"


def test_location_delete_takes_files_and_folders_and_what_is_not_there(tmp_path):
    folder = Location.parse(tmp_path) / "folder"
    (folder / "a").write_bytes(b"1")
    (folder / "a").delete()
    folder.delete()
    folder.delete()
    assert not folder.exists()


@pytest.mark.parametrize("uri", ["nonsense://x/y", "s4://bucket"])
def test_location_of_an_unknown_scheme_is_refused_in_a_sentence(uri):
    with pytest.raises(UserError, match="not a location"):
        Location.parse(uri)
