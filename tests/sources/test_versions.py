"""Versions: no change is reported twice, and no deleted object returns, in any order of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.model.names import NamespacedName
from userspace_proxy.sources.versions import Versions

A, B = NamespacedName("default", "a"), NamespacedName("default", "b")


@given(st.data())
def test_reordered_and_repeated_writes_end_with_the_latest_versions(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.tuples(st.sampled_from([A, B]), st.booleans()), min_size=1, max_size=8))
    writes = [(version, name, lives) for version, (name, lives) in enumerate(kinds, start=10)]
    heard = data.draw(st.permutations(writes + data.draw(st.lists(st.sampled_from(writes)))))
    told = Versions()
    shown: dict[NamespacedName, int] = {}

    for version, name, lives in heard:
        if lives and told.sets(name, version):
            shown[name] = version
        elif not lives and told.deletes(name, version):
            del shown[name]

    last = {name: (version, lives) for version, name, lives in writes}
    assert shown == {name: version for name, (version, lives) in last.items() if lives}


def test_a_list_reports_changed_and_deleted_objects() -> None:
    told = Versions()
    told.sets(A, 1)
    told.sets(B, 2)

    assert told.replace({A: 1}, 5) == ([], [B])
    assert told.replace({A: 7, B: 8}, 9) == ([A, B], [])


def test_versions_covered_by_a_list_or_a_bookmark_are_old() -> None:
    told = Versions()
    told.replace({}, 5)
    assert not told.sets(A, 5)

    assert told.sets(A, 6)
    assert told.deletes(A, 7)
    told.covers(8)
    assert not told.sets(A, 6)
    assert told.sets(A, 9)


def test_a_cluster_restored_from_a_backup_begins_at_older_versions() -> None:
    told = Versions()
    told.replace({A: 900}, 1_000)

    assert told.replace({A: 90}, 100) == ([A], [])
    assert told.sets(A, 101)


def test_forgotten_versions_are_reported_again() -> None:
    told = Versions()
    told.replace({A: 1, B: 2}, 5)
    told.forget()

    assert told.replace({A: 1}, 5) == ([A], [B])
