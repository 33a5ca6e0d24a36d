"""Which addresses a request may name: no spelling and no detour leads into a private network."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from httpx2 import URL
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import InputUrlRefused, SettingsError
from worker.media.address_guard import PRIVATE, AddressRules, embedded_ipv4, is_public
from worker.media.url_inputs import UrlFetcher
from worker.settings import Settings

V4 = st.ip_addresses(v=4).map(lambda address: IPv4Address(int(address)))
V6 = st.ip_addresses(v=6).map(lambda address: IPv6Address(int(address)))
LOCAL_V4 = st.sampled_from(
    ["10.0.0.1", "172.16.0.1", "192.168.1.1", "127.8.9.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"]
).map(IPv4Address)


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254"),
        *("169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.0.0.192", "192.0.0.9"),
        *("192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1", "224.0.0.1", "239.255.255.250"),
        *("240.0.0.1", "255.255.255.255", "168.63.129.16"),
        *("::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "fc00::1"),
        *("fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "100::1", "2001:db8::1", "2001::1", "2001:1::1"),
        *("2002:7f00:1::", "2002:808:808::", "2001:0:7f00:1::", "3fff::1", "5f00::1"),
    ],
)
def test_what_is_not_on_the_internet(address: str) -> None:
    assert not is_public(ip_address(address))
    assert not AddressRules().admits("example.com", address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "172.32.0.1"]
)
def test_what_is_on_the_internet(address: str) -> None:
    assert is_public(ip_address(address))


@given(V4)
def test_no_ipv4_address_is_public_that_python_calls_otherwise(address: IPv4Address) -> None:
    if not address.is_global or address.is_multicast or address.is_reserved or address.is_link_local or address.is_unspecified:
        assert not is_public(address)


@given(V6)
def test_no_ipv6_address_is_public_that_python_calls_otherwise(address: IPv6Address) -> None:
    if embedded_ipv4(address) is None and (not address.is_global or address.is_multicast or address.is_site_local):
        assert not is_public(address)


@given(V4 | LOCAL_V4)
def test_an_embedded_address_is_judged_as_itself_and_a_tunnel_never_passes(address: IPv4Address) -> None:
    number = int(address)
    for prefix in (0xFFFF << 32, 0x64FF9B << 96):
        assert is_public(IPv6Address(prefix | number)) == is_public(address)
    compatible, six_to_four = IPv6Address(number), IPv6Address((0x2002 << 112) | (number << 80) | 1)
    teredo = IPv6Address((0x20010000 << 96) | (number << 64) | (number ^ 0xFFFFFFFF))
    assert not any(map(is_public, (compatible, six_to_four, teredo)))


def refusal_of(url: str) -> str | None:
    """As requests are answered: httpx2 reads an address first, and refuses some itself."""
    try:
        UrlFetcher().check("a.png", url)
    except InputUrlRefused as exc:
        return str(exc)
    return None


@given(V4 | LOCAL_V4, st.integers(1, 4), st.tuples(*[st.sampled_from(["d", "x", "o"])] * 4))
def test_no_odd_spelling_of_an_address_passes(address: IPv4Address, parts: int, bases: tuple[str, ...]) -> None:
    """All that inet_aton reads, and so every resolver: 1 to 4 parts, each decimal, octal or hexadecimal."""
    number = int(address)
    values = [(number >> (24 - 8 * at)) & 0xFF for at in range(parts - 1)]
    values.append(number & ((1 << (32 - 8 * (parts - 1))) - 1))
    written = {"d": "{}", "x": "0x{:x}", "o": "0{:o}"}
    host = ".".join(written[base].format(value) for value, base in zip(values, bases, strict=False))
    assert socket.inet_aton(host) == address.packed
    refusal = refusal_of(f"http://{host}/")
    assert (refusal is None) == (host == str(address) and is_public(address))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://example.com/a", "http:// or https://"),
        ("file:///etc/passwd", "http:// or https://"),
        ("data:image/png;base64,QQ==", "http:// or https://"),
        ("//example.com/a", "http:// or https://"),
        ("https://user:secret@example.com/a", "user name"),
        ("https://user@example.com/a", "user name"),
        ("https:///a", "no valid host"),
        ("http://example.com:0/", "no valid host"),
        ("http://exa mple/", "no valid host"),
        ("http://%31%32%37.0.0.1/", "no valid host"),
        ("http://127.0.0.1./", "private"),
        ("http://①②⑦.0.0.1/", "no valid address"),
        ("http://127.1/", "usual form"),
        ("http://a.b.1/", "usual form"),
        ("http://0x7f000001/", "usual form"),
        ("http://2130706433/", "usual form"),
        ("http://0177.0.0.1/", "no valid address"),
        ("http://[::ffff:127.0.0.1]/", "private"),
        ("http://[::1]/", "private"),
        ("http://[fd00:ec2::254]/latest", "private"),
        ("http://169.254.169.254/latest/meta-data", "private"),
    ],
)
def test_addresses_that_need_no_look_up_to_be_refused(url: str, reason: str) -> None:
    assert reason in (refusal_of(url) or "passes")


@pytest.mark.parametrize(
    "url", ["https://example.com/a?b=c", "http://example.com:9000/", "http://8.8.8.8/", "https://a_b.example/"]
)
def test_what_may_be_looked_up(url: str) -> None:
    assert AddressRules().refusal(URL(url)) is None


def test_only_the_hosts_that_the_operator_lists() -> None:
    rules = AddressRules(hosts=("cdn.example.com", ".s3.example.com"))
    for host in ("cdn.example.com", "CDN.example.com.", "s3.example.com", "bucket.s3.example.com"):
        assert rules.refusal(URL(f"https://{host}/")) is None
    for host in ("example.com", "a.cdn.example.com", "evils3.example.com", "cdn.example.com.evil.net"):
        assert "INPUT_URL_HOSTS" in (rules.refusal(URL(f"https://{host}/")) or "")
    assert "send the file itself" in (AddressRules(hosts=()).refusal(URL("https://example.com/")) or "")


def test_exceptions_are_for_what_they_name_and_nothing_else() -> None:
    rules = AddressRules(private=("minio.internal", "10.1.0.0/16", "fd12::/32", "192.168.7.7"))
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd12::1", "192.168.7.7"):
        assert rules.admits("example.com", address)
    for address in ("10.2.0.1", "192.168.7.8", "127.0.0.1", "fd13::1", "no address"):
        assert not rules.admits("example.com", address)
    assert rules.admits("MinIO.internal.", "172.16.0.9")
    assert rules.refusal(URL("http://10.1.2.3:9000/")) is None
    assert rules.refusal(URL("http://10.2.2.3:9000/")) == PRIVATE


def test_the_rules_as_the_operator_sets_them() -> None:
    assert Settings.from_env({}).input_url_hosts is None
    assert Settings.from_env({"INPUT_URL_HOSTS": "None"}).input_url_hosts == ()
    assert Settings.from_env({"INPUT_URL_HOSTS": "A.example, .b.example"}).input_url_hosts == ("a.example", ".b.example")
    places = "MinIO.internal, 10.1.0.0/16,fd00::/8,::1"
    assert Settings.from_env({"INPUT_URL_ALLOW_PRIVATE": places}).input_url_allow_private == (
        "minio.internal",
        "10.1.0.0/16",
        "fd00::/8",
        "::1",
    )


@pytest.mark.parametrize("value", ["10.1.2.3/16", "10.0.0.0/33", "http://minio", "a b"])
def test_an_exception_that_would_mean_nothing_stops_the_worker(value: str) -> None:
    with pytest.raises(SettingsError, match="INPUT_URL_ALLOW_PRIVATE must be host names"):
        Settings.from_env({"INPUT_URL_ALLOW_PRIVATE": value})
