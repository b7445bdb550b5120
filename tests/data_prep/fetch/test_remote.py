import pytest

from data_prep.fetch.remote import FetchError, open_remote, refusal


def read(url, **options):
    with open_remote(url, **options) as body:
        return body, b"".join(body.chunks())


@pytest.fixture
def mark(server):
    server.files["/a"] = bytes(range(100))
    return read(server.url("/a"))[0].mark


def test_whole_file(server, mark):
    body, data = read(server.url("/a"))
    assert (body.start, body.total, data) == (0, 100, bytes(range(100)))
    assert mark.startswith('"')


def test_rest_of_a_file(server, mark):
    body, data = read(server.url("/a"), start=40, mark=mark)
    assert (body.start, body.total, data) == (40, 100, bytes(range(40, 100)))


def test_file_that_changed_begins_at_0(server, mark):
    server.files["/a"] = bytes(100)
    body, data = read(server.url("/a"), start=40, mark=mark)
    assert (body.start, data) == (0, bytes(100))


def test_change_that_a_weak_mark_cannot_prevent_is_seen(server, mark):
    server.fault = lambda path, number: "weak"
    weak = read(server.url("/a"))[0].mark
    assert read(server.url("/a"), start=40, mark=weak)[1] == bytes(range(40, 100))
    server.files["/a"] = bytes(100)
    with pytest.raises(FetchError, match="changed between two parts"):
        read(server.url("/a"), start=40, mark=weak)


def test_server_without_ranges_begins_at_0(server, mark):
    server.fault = lambda path, number: "no_range"
    assert read(server.url("/a"), start=40, mark=mark)[0].start == 0


def test_part_that_begins_elsewhere_is_refused(server, mark):
    server.fault = lambda path, number: "late_range"
    with pytest.raises(FetchError, match="sends byte 37, asked for 40"):
        read(server.url("/a"), start=40, mark=mark)


@pytest.mark.parametrize(
    ("fault", "again", "words"),
    [
        ("404", False, "no such file"),
        ("403", False, "not public"),
        ("401", False, "sign-in"),
        ("410", False, "no more"),
        ("418", False, "status 418"),
        ("429", True, "busy"),
        ("503", True, "busy"),
        ("html", True, "web page"),
        ("drop", True, "connection: "),
        ("cut", True, "connection: "),
        ("silent", True, "connection: "),
    ],
)
def test_what_a_fault_means(server, mark, fault, again, words):
    server.fault = lambda path, number: fault
    with pytest.raises(FetchError, match=words) as raised:
        read(server.url("/a"), silence_s=0.2)
    assert raised.value.again is again
    assert "0x" not in str(raised.value)


def test_range_behind_the_end(server, mark):
    with pytest.raises(FetchError, match="another one than before"):
        read(server.url("/a"), start=100, mark=mark)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7", 7.0), ("99999", 900.0), ("Mon, 01 Jan 2001 00:00:00 GMT", 0.0), ("soon", None)],
)
def test_pause_that_a_server_asks_for(text, seconds):
    assert refusal(429, text).wait_s == seconds


def test_local_file_by_range(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(100)))
    body, _ = read(path.as_uri())
    body, data = read(path.as_uri(), start=40, mark=body.mark)
    assert (body.start, body.total, data) == (40, 100, bytes(range(40, 100)))
    assert read(path.as_uri(), start=40, mark="other")[0].start == 0


def test_local_file_that_is_not_there(tmp_path):
    with pytest.raises(FetchError, match="no such file") as raised:
        read((tmp_path / "b").as_uri())
    assert not raised.value.again
    with pytest.raises(FetchError, match="is a folder"):
        read(tmp_path.as_uri())


def test_no_server_at_all(server):
    with pytest.raises(FetchError, match="connection: ") as raised:
        read("http://127.0.0.1:9/a.h5ad")
    assert raised.value.again


def test_address_that_makes_no_sense():
    with pytest.raises(FetchError) as raised:
        read("http://:99999999/a.h5ad")
    assert not raised.value.again


def test_cloud_without_its_library_names_it():
    with pytest.raises(FetchError, match="s3fs") as raised:
        read("s3://bucket/a.h5ad")
    assert not raised.value.again
