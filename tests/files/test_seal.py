"""Pages that say their own checksum."""

from __future__ import annotations

from bone_fx.files.seal import is_sealed, sealed


def test_an_edited_page_is_known() -> None:
    page = sealed("<p>ä</p>")
    assert is_sealed(page)
    assert not is_sealed(page.replace(b"<p>", b"<b>"))
    assert not is_sealed(page + b" ")
    assert not is_sealed(b"<p></p>")
    assert not is_sealed(b"")
