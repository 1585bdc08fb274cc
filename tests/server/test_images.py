"""Images are taken as bytes; URIs only as far as the settings allow, and never out of their fence."""

import base64
import io
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from errata.editor.errors import ImageError
from errata.editor.images import ImageLimits
from errata.server.conversion import Decoder
from errata.server.download import DownloadError, download, is_public
from errata.server.errors import BusyError
from errata.server.images import ImagePolicy
from errata.server.settings import Settings
from errata.v1 import common_pb2, inference_pb2


def png(size: tuple[int, int] = (4, 3), colour: str = "red") -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", size, colour).save(encoded, "PNG")
    return encoded.getvalue()


def refused(policy: ImagePolicy, image: common_pb2.Image) -> ImageError:
    with pytest.raises(ImageError) as caught:
        policy.open(image, "images[0]")
    return caught.value


def by_uri(uri: str) -> common_pb2.Image:
    return common_pb2.Image(uri=uri)


def test_bytes_are_decoded_by_the_default_policy() -> None:
    image = ImagePolicy.of(Settings()).open(common_pb2.Image(data=png()), "images[0]")
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((4, 3), "RGB", (255, 0, 0))


def test_an_image_that_is_neither_is_refused() -> None:
    error = refused(ImagePolicy(), common_pb2.Image())
    assert (error.field, error.reason) == ("images[0]", "INVALID_IMAGE")


@pytest.mark.parametrize("data", [b"", b"GIF89a", png()[:-30], b"\x89PNG\r\n\x1a\n", b"<svg/>"])
def test_bytes_that_are_no_whole_image_are_refused(data: bytes) -> None:
    assert refused(ImagePolicy(), common_pb2.Image(data=data)).field == "images[0].data"


def test_bytes_and_pixels_are_bounded() -> None:
    at_most = ImagePolicy(limits=ImageLimits(max_bytes=len(png()), max_pixels=12))
    assert at_most.open(common_pb2.Image(data=png()), "images[0]").size == (4, 3)
    fewer_bytes = ImagePolicy(limits=ImageLimits(max_bytes=len(png()) - 1))
    fewer_pixels = ImagePolicy(limits=ImageLimits(max_pixels=11))
    assert "bytes" in str(refused(fewer_bytes, common_pb2.Image(data=png())))
    assert "pixels" in str(refused(fewer_pixels, common_pb2.Image(data=png())))


def test_the_images_of_one_call_share_its_pixels_and_the_next_call_has_its_own() -> None:
    decoder = Decoder(ImagePolicy(request_pixels=24))
    two = common_pb2.Prompt(text="What is this?", images=[common_pb2.Image(data=png())] * 2)
    three = common_pb2.Prompt(text="What is this?", images=[common_pb2.Image(data=png())] * 3)

    for _ in range(2):
        assert len(decoder.generate(inference_pb2.GenerateRequest(version="models/a", prompt=two)).prompt.images) == 2
    with pytest.raises(ImageError, match="together") as caught:
        decoder.generate(inference_pb2.GenerateRequest(version="models/a", prompt=three))
    assert caught.value.field == "prompt.images[2]"


def test_the_images_of_one_prompt_share_what_one_image_may_have() -> None:
    decoder = Decoder(ImagePolicy(limits=ImageLimits(max_pixels=24)))
    prompt = common_pb2.Prompt(text="What is this?", images=[common_pb2.Image(data=png())] * 3)
    with pytest.raises(ImageError, match="prompt's images have more than 24 pixels") as caught:
        decoder.generate(inference_pb2.GenerateRequest(version="models/a", prompt=prompt))
    assert caught.value.field == "prompt.images[2]"


def test_the_images_of_all_calls_share_a_budget_for_as_long_as_they_are_held() -> None:
    decoder = Decoder(ImagePolicy(request_pixels=24).within_budget())
    request = inference_pb2.GenerateRequest(
        version="models/a", prompt=common_pb2.Prompt(text="What?", images=[common_pb2.Image(data=png())] * 2)
    )
    held = [decoder.generate(request) for _ in range(3)]
    with pytest.raises(BusyError, match="fill the memory") as caught:
        decoder.generate(request)
    assert caught.value.retry_after
    del caught
    held.pop()
    assert len(decoder.generate(request).prompt.images) == 2


@pytest.mark.parametrize(
    "uri",
    ["file:///etc/passwd", "http://example.org/a.png", "https://example.org/a.png", "data:image/png;base64,AAAA",
     "ftp://example.org/a.png", "gopher://x", "FILE:///etc/passwd", "/etc/passwd", "C:\\a.png", "", "a b", "//x/y"],
)  # fmt: skip
def test_by_default_no_uri_is_taken(uri: str) -> None:
    error = refused(ImagePolicy.of(Settings()), by_uri(uri))
    assert error.field == "images[0].uri"
    assert "do not allow" in str(error)


def test_a_scheme_that_nobody_implements_is_refused_even_if_allowed() -> None:
    assert "do not allow" in str(refused(ImagePolicy(schemes=frozenset({"ftp"})), by_uri("ftp://example.org/a.png")))


def test_a_data_uri_is_as_good_as_bytes() -> None:
    policy = ImagePolicy(schemes=frozenset({"data"}))
    uri = "data:image/png;name=x;base64," + base64.b64encode(png()).decode()
    assert policy.open(by_uri(uri), "images[0]").size == (4, 3)


@pytest.mark.parametrize(
    "uri", ["data:", "data:image/png;base64", "data:;base64,***", "data:;base64,A", "data:,é", "data:;base64,é"]
)
def test_a_malformed_data_uri_is_refused(uri: str) -> None:
    assert refused(ImagePolicy(schemes=frozenset({"data"})), by_uri(uri)).field.startswith("images[0]")


def test_a_data_uri_is_bounded_like_bytes() -> None:
    policy = ImagePolicy(schemes=frozenset({"data"}), limits=ImageLimits(max_bytes=100))
    assert "bytes" in str(refused(policy, by_uri("data:;base64," + "A" * 10_000)))
    assert "bytes" in str(refused(policy, by_uri("data:;base64," + "A" * 200)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "served"
    path.mkdir()
    (path / "a b.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    return path


def files_of(folder: Path, **given: object) -> ImagePolicy:
    return ImagePolicy(schemes=frozenset({"file"}), folders=(folder,), **given)  # type: ignore[arg-type]


def test_a_file_below_a_named_folder_is_taken(folder: Path) -> None:
    for uri in (f"file://{folder}/a%20b.png", f"file://localhost{folder}/a%20b.png", f"file:{folder}/a%20b.png"):
        assert files_of(folder).open(by_uri(uri), "images[0]").size == (4, 3)


def test_nothing_outside_the_folder_is_read(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    beside = folder.with_name("served2")
    beside.mkdir()
    (beside / "x.png").write_bytes(png())
    for path in (
        f"{folder}/../secret.png",
        f"{folder}/%2e%2e/secret.png",
        f"{folder}/..%2fsecret.png",
        f"{folder}/link.png",
        f"{folder}/circle.png",
        f"{beside}/x.png",
        f"{folder}/a%00.png",
        f"{folder}/%ff.png",
        "relative.png",
    ):
        assert refused(files_of(folder), by_uri(f"file://{path}")).field == "images[0].uri"
    assert "folders" in str(refused(files_of(folder), by_uri("file://elsewhere/x.png")))


def test_only_regular_files_are_read_and_a_pipe_does_not_block(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert "no regular file" in str(refused(files_of(folder), by_uri(f"file://{folder}/pipe")))
    assert refused(files_of(folder), by_uri(f"file://{folder}")).field == "images[0].uri"
    assert "cannot be read" in str(refused(files_of(folder), by_uri(f"file://{folder}/nowhere.png")))


def test_a_file_is_bounded_like_bytes(folder: Path) -> None:
    assert "bytes" in str(
        refused(files_of(folder, limits=ImageLimits(max_bytes=10)), by_uri(f"file://{folder}/a%20b.png"))
    )


class Pictures(BaseHTTPRequestHandler):
    """A server of one picture, and of what a hostile one does."""

    released = threading.Event()

    def do_GET(self) -> None:
        match self.path.split("?")[0]:
            case "/a.png":
                self._answer(200, png())
            case "/once":
                self._answer(302, b"", Location="/a.png?twice")
            case "/circle":
                self._answer(302, b"", Location="/circle")
            case "/passwd":
                self._answer(301, b"", Location="file:///etc/passwd")
            case "/nowhere":
                self._answer(307, b"", Location="")
            case "/endless":
                self.send_response(200)
                self.end_headers()
                while self._written(b"x" * 65536):
                    pass
            case "/slow":  # a byte now and then: no read times out
                self.send_response(200)
                self.end_headers()
                while self._written(b"x") and not self.released.wait(0.02):
                    pass
            case _:
                self._answer(404, b"")

    def _written(self, data: bytes) -> bool:
        try:
            self.wfile.write(data)
        except OSError:
            return False
        return True

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        Pictures.released.set()
        server.shutdown()
        thread.join()


NETWORK = ImagePolicy(schemes=frozenset({"http"}), private_addresses=True)


@pytest.mark.parametrize("path", ["/a.png", "/a.png?x=1", "/once"])
def test_an_image_is_fetched_where_settings_allow_it(address: str, path: str) -> None:
    assert NETWORK.open(by_uri(address + path), "images[0]").size == (4, 3)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/missing", "answers 404"),
        ("/circle", "redirects more than"),
        ("/nowhere", "redirects more than|answers"),
        ("/passwd", "scheme 'file'"),
        ("/endless", "more than"),
    ],
)
def test_what_a_web_server_must_not_do_is_refused(address: str, path: str, why: str) -> None:
    with pytest.raises(ImageError, match=why) as caught:
        NETWORK.open(by_uri(address + path), "images[0]")
    assert caught.value.field == "images[0].uri"


def test_a_server_that_trickles_is_cut_off(address: str) -> None:
    policy = ImagePolicy(schemes=frozenset({"http"}), private_addresses=True, timeout_seconds=0.3)
    assert "longer than 0.3 s" in str(refused(policy, by_uri(f"{address}/slow")))


def test_this_machine_is_not_fetched_from_unless_told(address: str) -> None:
    policy = ImagePolicy(schemes=frozenset({"http"}))
    port = address.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::1]", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"):
        assert "no public address" in str(refused(policy, by_uri(f"http://{host}:{port}/a.png"))), host


@pytest.mark.parametrize(
    "uri",
    ["http://", "http:///a.png", "http://user:pw@127.0.0.1/", "http://127.0.0.1:99999/", "http://[::1/", "http://é/",
     "http://a b/", "http://127.0.0.1/\r\nX: y", "http://" + "a" * 300 + "/"],
)  # fmt: skip
def test_a_malformed_address_is_refused(uri: str) -> None:
    assert refused(NETWORK, by_uri(uri)).field == "images[0].uri"


def test_nobody_listening_is_an_image_error() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: it refuses
        assert "cannot be fetched" in str(refused(NETWORK, by_uri(f"http://127.0.0.1:{held.getsockname()[1]}/")))


def test_https_does_not_speak_to_a_server_that_shows_no_certificate(address: str) -> None:
    with pytest.raises(DownloadError, match="cannot be fetched"):
        download(
            address.replace("http:", "https:") + "/a.png",
            schemes={"https"},
            max_bytes=1000,
            timeout=5,
            private_addresses=True,
        )


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1",
     "::ffff:8.8.8.8", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:53aa:64c:0:7a00:80ff:fffe", "no address"],
)  # fmt: skip
def test_an_address_of_or_round_to_this_machine_or_network_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111"])
def test_an_address_on_the_internet_is_public(address: str) -> None:
    assert is_public(address)
