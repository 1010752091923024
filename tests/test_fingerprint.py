"""Fingerprints of data: by content, kept beside large files, and quick for many pictures."""

import hashlib
import os

import pytest

from vlmbench.data import fingerprint
from vlmbench.data.fingerprint import data_hashes, file_hash


@pytest.fixture
def small_files_count_as_large(monkeypatch):
    monkeypatch.setattr(fingerprint, 'KEPT_FROM', 1)


def test_the_hash_of_a_large_file_is_kept_while_it_stays(
    tmp_path, monkeypatch, small_files_count_as_large
):
    rows = tmp_path / 'rows.jsonl'
    rows.write_text('{}\n')
    expected = hashlib.sha256(b'{}\n').hexdigest()
    assert file_hash(rows) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.rows.jsonl.sha256', 'rows.jsonl']
    read = []
    content = fingerprint._content_hash
    monkeypatch.setattr(fingerprint, '_content_hash', lambda *a: read.append(a) or content(*a))
    assert file_hash(rows) == expected and not read
    rows.write_text('{} \n')  # another size
    assert file_hash(rows) != expected and len(read) == 1
    before = file_hash(rows)
    rows.write_text('[] \n')  # the same size at another time
    os.utime(rows, ns=(1, 1))
    assert file_hash(rows) != before and len(read) == 2
    # the kept hash is no part of the data
    assert list(data_hashes(tmp_path)['files']) == ['rows.jsonl']


@pytest.mark.parametrize('kept', ['', '[]', '{"file": 3}', '{"file": {}, "sha256": "0"}'])
def test_a_kept_hash_that_does_not_belong_is_not_believed(
    tmp_path, kept, small_files_count_as_large
):
    rows = tmp_path / 'rows.json'
    rows.write_text('[1]')
    (tmp_path / '.rows.json.sha256').write_text(kept)
    assert file_hash(rows) == hashlib.sha256(b'[1]').hexdigest()


def test_a_folder_is_listed_in_the_order_of_its_parts(tmp_path):
    for name in ('a/b.png', 'a.png', 'a-b/c.png', '.hidden/x.png', 'a/.x.png', 'rows.json'):
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b'123')
    found = data_hashes(tmp_path)
    listing = '\n'.join(f'{name}\t3' for name in ('a/b.png', 'a-b/c.png', 'a.png'))
    assert found['others'] == dict(
        count=3, bytes=9, listing_sha256=hashlib.sha256(listing.encode()).hexdigest()
    )
    assert list(found['files']) == ['rows.json']
    with pytest.raises(FileNotFoundError, match='nowhere'):
        data_hashes(tmp_path / 'nowhere')
