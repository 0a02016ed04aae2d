"""Files that are none, JSON that is a bomb, text that steers terminals."""

import os
import sys

import pytest

from hpc_resume.untrusted import (
    brief,
    check_nesting,
    check_text,
    open_regular,
    parse_json,
    printable,
    read_regular,
)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e999]", "finite"),
        (b"[" * 100_000, "nested"),
        (b"1" * 5_000, "digits"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'"\xed\xa0\x80"', "utf-8"),
        (b"", "Expecting"),
        (b"{} {}", "Extra"),
    ],
)
def test_json_has_one_meaning(data, why):
    with pytest.raises(ValueError, match=why):
        parse_json(data)


def test_json_as_we_write_it_is_read():
    assert parse_json(b'{"a": [1.5, -0.0, 1e300, true, null, "\\u00e9\\ud83d\\ude00"]}') == {
        "a": [1.5, 0.0, 1e300, True, None, "é😀"]
    }


@pytest.mark.skipif(not hasattr(sys, "set_int_max_str_digits"), reason="this Python never has one")
def test_integers_stay_bounded_where_python_has_no_limit_of_its_own():
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        with pytest.raises(ValueError, match="digits"):
            parse_json(b"[" + b"7" * 5_000 + b"]")
        assert parse_json(b"[" + b"7" * 4_000 + b"]") == [int("7" * 4_000)]
    finally:
        sys.set_int_max_str_digits(before)


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    assert read_regular(tmp_path / "file", longest_bytes=3) == b"abc"
    assert read_regular(tmp_path / "link", longest_bytes=3) == b"abc"
    for name, why in (("fifo", "a FIFO"), ("", "a folder"), ("link", "a symbolic link")):
        with pytest.raises(OSError, match=why):
            read_regular(tmp_path / name, longest_bytes=3, follow=False)
    with pytest.raises(OSError, match="a device"):
        open_regular("/dev/zero")
    with pytest.raises(OSError, match="longer than 2 bytes"):
        read_regular(tmp_path / "file", longest_bytes=2)
    with pytest.raises(OSError, match="longer than 1000000 bytes"):
        # A file that says that it is empty, and is not.
        read_regular("/proc/kallsyms", longest_bytes=1_000_000)


def test_nesting_is_measured_without_recursion():
    deep = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than 16"):
        check_nesting(deep, 16)
    check_nesting({"a": [{"b": 1}]}, 3)
    with pytest.raises(ValueError, match="nested"):
        check_nesting({"a": [{"b": 1}]}, 2)
    assert len(brief(deep)) < 40


def test_messages_stay_short_and_steer_no_terminal():
    assert len(brief("x" * 10**6)) < 100
    assert len(brief(list(range(10**5)))) < 100
    assert printable("a\x1b[2J\u202e\ud800 é\n\tb") == "a\\x1b[2J\\u202e\\ud800 é\n\tb"
    with pytest.raises(ValueError, match="surrogates"):
        check_text("\ud800")
