import pytest

from placesearch.errors import InputError
from placesearch.storage_url import VARIABLE, StorageUrl

PASSWORDS = [
    "postgresql://ann:hunter2@db.example:5432/studies",
    "postgresql://ann:hun@ter2@db.example/studies?sslmode=require",
    "postgresql+psycopg2://:hunter2@db.example/studies",
    "postgresql://db.example/studies?user=ann&password=hunter2",
    "postgresql://db.example/studies?sslpassword=hunter2&sslmode=require",
    "mysql://ann:hunter2@db.example/studies?charset=utf8mb4",
    "mariadb://db.example/studies?passwd=hunter2",
]


@pytest.mark.parametrize("text", PASSWORDS)
def test_a_password_is_in_nothing_but_what_is_revealed(text):
    url = StorageUrl.parse(text)
    for seen in (url.shown, repr(url), str(url), f"{url}"):
        assert "ter2" not in seen
    assert "ter2" in url.revealed()
    assert url.has_password
    assert not StorageUrl.parse(url.shown).has_password


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://ann@db.example:5432/studies",
        "postgresql:///?service=studies",
        "postgresql:///studies?host=/var/run/postgresql&passfile=/home/ann/.pgpass",
        "sqlite:///studies.db",
        "sqlite:////srv/studies.db",
        "grpc://db.example:13000",
    ],
)
def test_an_address_without_a_password_is_shown_as_it_is(text):
    url = StorageUrl.parse(text)
    assert url.shown == text
    assert not url.has_password
    assert url.revealed().partition("://")[2] == text.partition("://")[2]
    assert StorageUrl.parse(url.shown) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hunter2",
        "redis://:hunter2@db/0",
        "postgresql://ann:hun/hunter2@db/x",
        "postgresql://ann@db:hunter2/x",
        "postgresql://ann:hunter2@db/x#fragment",
    ],
)
def test_what_is_no_address_is_refused_without_being_repeated(text):
    with pytest.raises(InputError, match="--storage takes an address") as caught:
        StorageUrl.parse(text)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("text", ["grpc://db.example", "grpc://db.example:13000/studies", "grpc://:13000"])
def test_a_proxy_has_a_host_and_a_port_and_nothing_else(text):
    with pytest.raises(InputError, match="host and a port"):
        StorageUrl.parse(text)


def test_the_environment_gives_the_password_of_the_very_address(monkeypatch):
    url = StorageUrl.parse("postgresql://ann@db.example/studies")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert url.with_secret() == url
    monkeypatch.setenv(VARIABLE, "postgresql://ann:hunter2@db.example/studies")
    assert "hunter2" in url.with_secret().revealed()
    assert url.with_secret().shown == url.shown
    other = StorageUrl.parse("postgresql://ann@elsewhere.example/studies")
    assert other.with_secret() == other


@pytest.mark.parametrize(
    ("text", "kind"), [("postgresql+psycopg2://h/d", "postgresql"), ("mysql://h/d", "mysql"), ("grpc://h:1", "grpc")]
)
def test_the_kind_is_the_name_of_the_database(text, kind):
    assert StorageUrl.parse(text).kind == kind
