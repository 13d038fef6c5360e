"""What an operator may write for a tier, and what is said of the rest."""

from __future__ import annotations

import pytest

from kv_transfer.tiers.config import KvConfig, Tier, parse, size_text


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("host:2GiB", 2 << 30), ("host:1.5MiB", 3 << 19), ("host:64KiB", 64 << 10)]
)
def test_a_tier_is_its_kind_and_its_size(text: str, size_bytes: int) -> None:
    assert parse((text,)) == (Tier(kind="host", capacity_bytes=size_bytes),)


def test_a_file_tier_has_a_folder_which_may_have_colons() -> None:
    tiers = parse(("host:1GiB", "file:/mnt/a:b:50GiB"))
    assert tiers[1] == Tier(kind="file", capacity_bytes=50 << 30, place="/mnt/a:b")


def test_options_are_read_from_the_right_and_may_have_colons() -> None:
    folder, bucket = parse(
        (
            "host:1GiB",
            "file:/mnt/a,b:50GiB,shared=true,scope_share=0.5",
            "s3://bucket/some/prefix:1TiB,endpoint=http://127.0.0.1:5000,region=eu-west-1",
        )
    )[1:]
    assert folder == Tier(kind="file", capacity_bytes=50 << 30, place="/mnt/a,b", shared=True, scope_share=0.5)
    assert (bucket.place, bucket.capacity_bytes) == ("bucket/some/prefix", 1 << 40)
    assert (bucket.endpoint, bucket.region) == ("http://127.0.0.1:5000", "eu-west-1")


def test_a_tier_may_have_a_bound_of_writes_and_a_way_past_host_memory() -> None:
    folder = parse(("host:1GiB", "file:/a:1GiB,write_per_s=100MiB,gpudirect=required"))[1]
    assert (folder.write_bytes_per_s, folder.gpudirect) == (100 << 20, "required")
    assert [tier.key_file for tier in parse(("host:1GiB", "file:/a:1GiB,key_file=/run/k"))] == ["", "/run/k"]
    bucket = parse(("host:1GiB", "s3://bucket/a:1GiB,write_per_s=1.5MiB,required=true"))[1]
    assert (bucket.write_bytes_per_s, bucket.required) == (3 << 19, True)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (("host",), "'host' must be KIND:PLACE:SIZE, as in host:2GiB or"),
        (("hots:2GiB",), "there is no tier 'hots', only host, file, s3; did you mean 'host'?"),
        (("host:/tmp:2GiB",), "'host:/tmp:2GiB' must be host:SIZE"),
        (("host:1GiB", "file:2GiB"), "'file:2GiB' must be file:/FOLDER:SIZE"),
        (("host:1GiB", "file:kv:2GiB"), "'file:kv:2GiB' must be file:/FOLDER:SIZE"),
        (("file:/mnt/kv:2GiB",), "the first must be a host tier, through which KV comes and goes; add host:SIZE"),
        (("host:2GB",), "the size '2GB' must be a number and one of KiB, MiB, GiB, TiB"),
        (("host:GiB",), "the size 'GiB' must be"),
        (("host:-1GiB",), "the size '-1GiB' must be"),
        (("host:0GiB",), "the size must be above 0"),
        (("host:1GiB", "host:2GiB"), "'host' is there twice"),
        (("host:1GiB", "s3://B:1GiB"), "must be s3://BUCKET/PREFIX:SIZE"),
        (("host:1GiB", "s3://bucket/../x:1GiB"), "must be s3://BUCKET/PREFIX:SIZE"),
        (("host:1GiB", "s3:bucket:1GiB"), "must be s3://BUCKET/PREFIX:SIZE"),
        (("host:1GiB,shared=true",), "a host tier has no option 'shared', only none"),
        (("host:1GiB", "file:/a:1GiB,share=true"), "has no option 'share', only shared, scope_share, write_per_s"),
        (("host:1GiB", "file:/a:1GiB,shared=yes"), "shared must be true or false"),
        (("host:1GiB", "file:/a:1GiB,scope_share=2"), "scope_share must be above 0 and at most 1"),
        (("host:1GiB", "file:/a:1GiB,write_per_s=fast"), "the size 'fast' must be a number and one of"),
        (("host:1GiB", "s3://bucket/a:1GiB,endpoint=localhost:9000"), "endpoint must be http://HOST:PORT or https://"),
        (("host:1GiB", "s3://bucket/a:1GiB,region="), "region must be given"),
        (("host:1GiB", "file:/a:1GiB,gpudirect=yes"), "gpudirect must be true or required"),
        (("host:1GiB", "file:/a:1GiB,key_file=key"), "key_file must be the whole path of a file"),
        (("host:1GiB,key_file=/k",), "a host tier has no option 'key_file'"),
        (("host:1GiB", "file:/a:1GiB,gpudirect=true,key_file=/k"), "gpudirect and key_file exclude each other"),
        (
            ("host:1GiB", "file:/a:1GiB,gpudirect=true", "s3://bucket/a:1GiB"),
            "with gpudirect there is no s3 tier: KV goes to S3 through host memory only",
        ),
    ],
)
def test_what_cannot_be_read_is_said_of_the_setting(texts: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError, match=r"kv\.tiers: ") as raised:
        KvConfig(tiers=texts)
    assert told in str(raised.value)


def test_a_size_is_written_as_it_is_read() -> None:
    assert [size_text(size) for size in (0, 5 << 20, 3 << 29, 2 << 40)] == ["0KiB", "5MiB", "1.5GiB", "2TiB"]
