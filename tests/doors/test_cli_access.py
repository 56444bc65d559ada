"""Tenants and keys on the command line."""

from __future__ import annotations

from typing import Any

from saying import Said, one_line

NOT_SO = [
    (["tenant", "acm"], ["no tenant 'acm'", "Did you mean 'acme'"]),
    (["tenant", "acm", "--remove"], ["Did you mean 'acme'"]),
    (["tenant", "acme", "--remove"], ["1 live keys", "force"]),
    (["tenant", "acme", "--remove", "--weight", "2"], ["--remove stands alone"]),
    (["tenant", "acme", "--force"], ["--force with --remove"]),
    (["tenant", "--weight", "2"], ["which tenant"]),
    (["tenant", "--remove"], ["which tenant"]),
    (["tenant", "acme", "--weight", "0"], ["weight must be above 0"]),
    (["tenant", "acme", "--weight", "nan"], ["weight must be above 0"]),
    (["tenant", "acme", "--concurrency", "9" * 400], ["concurrency must be 0"]),
    (["tenant", "acme", "--rate", "-1"], ["rate must be 0"]),
    (["tenant", "a/b", "--weight", "1"], ["not allowed"]),
    (["tenant", "ACME", "--weight", "1"], ["letter case"]),
    (["key", "acm"], ["Did you mean 'acme'"]),
    (["key", "acme", "--admin"], ["belongs to no tenant"]),
    (["key", "--note", "x"], ["a key that is made"]),
    (["key", "acme", "--revoke", "x"], ["--revoke ID stands alone"]),
    (["key", "--revoke", "0123456789abcdef"], ["no live key"]),
]


def test_tenants_are_set_in_part_shown_listed_and_removed(ok: Any, parsed: Any, make_fleet: Any) -> None:
    make_fleet()
    assert parsed("tenant") == []
    made = parsed("tenant", "acme", "--variants", "acme-*, support", "--rate", "2.5")
    assert made == {"name": "acme", "variants": ["acme-*", "support"], "base": True, "weight": 1.0, "concurrency": 0,
                    "rate": 2.5, "tokens_per_minute": 0.0}  # fmt: skip
    changed = parsed("tenant", "acme", "--no-base", "--weight", "3", "--concurrency", "8")
    assert changed == made | {"base": False, "weight": 3.0, "concurrency": 8}
    assert parsed("tenant", "acme", "--tokens-per-minute", "1000")["tokens_per_minute"] == 1000
    assert parsed("tenant", "acme", "--base", "--rate", "0", "--variants", "")["variants"] == []
    shown = parsed("tenant", "acme")
    assert shown == changed | {"base": True, "rate": 0.0, "tokens_per_minute": 1000.0, "variants": []}
    ok("tenant", "beta", "--weight", "0.5")
    assert [t["name"] for t in parsed("tenant")] == ["acme", "beta"]
    listed = ok("tenant").splitlines()
    assert listed[0].split()[:3] == ["tenant", "variants", "base"]
    assert listed[2].split() == ["beta", "*", "yes", "0.5", "-", "-", "-"]
    assert ok("tenant", "acme").splitlines()[1].split() == ["acme", "-", "yes", "3", "8", "-", "1000"]
    assert ok("tenant", "beta", "--remove") == "removed beta\n"
    ok("key", "acme")
    assert parsed("tenant", "acme", "--remove", "--force") == {"removed": "acme"}
    assert parsed("tenant") == []


def test_a_key_s_secret_is_printed_once(say: Said, ok: Any, parsed: Any, make_fleet: Any) -> None:
    from plures.store.access import Access

    fleet = make_fleet()
    assert parsed("key") == []
    ok("tenant", "acme", "--weight", "1")
    code, out, err = say("key", "acme", "--note", "of Ann")
    assert (code, out.count("\n"), err.count("\n")) == (0, 1, 1)
    assert "not shown again" in err and out.strip() not in err
    made = parsed("key", "--admin")
    assert made["kind"] == "admin" and made["tenant"] == ""
    with Access.open(fleet) as access:
        user, admin = access.who(out.strip()), access.who(made["secret"])
        assert user is not None and admin is not None
        assert (user.tenant, user.note, admin.id) == ("acme", "of Ann", made["id"])
        assert {line["by"] for line in access.log()} == {"command line"}
    listed = parsed("key")
    assert {k["id"]: k["kind"] for k in listed} == {user.id: "user", admin.id: "admin"}
    assert "secret" not in listed[0] and "hash" not in listed[0]
    assert out.strip().split("-", 2)[2] not in ok("key")
    assert ok("key", "--revoke", user.id) == f"revoked {user.id}\n"
    assert parsed("key", "--revoke", admin.id) == {"revoked": admin.id}
    assert ok("key").count("revoked ") == 2
    with Access.open(fleet) as access:
        assert access.who(out.strip()) is None


def test_what_no_tenant_and_no_key_may_be(say: Said, ok: Any, make_fleet: Any) -> None:
    make_fleet()
    ok("tenant", "acme", "--weight", "1")
    ok("key", "acme")
    for argv, words in NOT_SO:
        one_line(say(*argv), 2, *words)
