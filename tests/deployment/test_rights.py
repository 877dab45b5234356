"""Test that the S3 policy of overlays/plain-s3 is sufficient and minimal."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from semiscale import storage
from tests.conftest import set_store_environment
from tests.support import sample_images
from tests.support.servers import serve_store
from tests.support.stages import Stages

pytestmark = pytest.mark.slow

POLICY = Path(__file__).resolve().parents[2] / "manifests" / "overlays" / "plain-s3" / "s3-policy.json"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Return a run file with data in a bucket, and enforce the policy from then on."""
    missing = str(tmp_path / "none")
    files = {"AWS_CONFIG_FILE": missing, "AWS_SHARED_CREDENTIALS_FILE": missing, "AWS_DEFAULT_REGION": "us-east-1"}
    key = {"AWS_ACCESS_KEY_ID": "admin", "AWS_SECRET_ACCESS_KEY": "admin"}
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with serve_store("s3") as address:
        set_store_environment(monkeypatch, {**files, **key, "AWS_ENDPOINT_URL": address, "NO_PROXY": "127.0.0.1"})
        content = write_data(tmp_path)
        # The default session remembers the keys.
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        set_store_environment(
            monkeypatch, create_user_keys(POLICY.read_text().replace("DATA", "data").replace("BUCKET", "bucket"))
        )
        enforce = urllib.request.Request(f"{address}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
        with urllib.request.urlopen(enforce):
            yield content
        storage._open_store.cache_clear()


def write_data(folder: Path) -> dict[str, Any]:
    """Write the data of a run to a bucket, and a foreign object beside its workdir.

    Returns:
        The content of the run file.
    """
    session = boto3.Session().client("s3")
    for bucket in ("data", "bucket"):
        session.create_bucket(Bucket=bucket)
    session.put_object(Bucket="bucket", Key="other/object", Body=b"of somebody else")
    session.close()
    content = sample_images.write_run(folder)
    for path in (folder / "data").rglob("*.*"):
        storage.upload(path, f"s3://data/{path.relative_to(folder / 'data')}")
    uris = {
        name: [uri.replace(str(folder / "data"), "s3://data") for uri in value]
        for name in ("labeled", "validation", "test", "unlabeled")
        if isinstance(value := content[name], list)
    }
    return {**content, **uris, "classes": "s3://data/classes.txt", "workdir": "s3://bucket/semiscale"}


def create_user_keys(policy: str) -> dict[str, str]:
    """Create a user with a policy, and return its keys."""
    iam = boto3.Session().client("iam")
    iam.create_user(UserName="run")
    iam.put_user_policy(UserName="run", PolicyName="semiscale", PolicyDocument=policy)
    key = iam.create_access_key(UserName="run")["AccessKey"]
    iam.close()
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


def test_a_run_works_with_its_rights_and_cannot_write_outside_its_workdir(run: dict[str, Any], tmp_path: Path) -> None:
    stages = Stages(tmp_path, **{name: value for name, value in run.items() if "s3://" in str(value)})
    assert stages.report.report == "s3://bucket/semiscale/trial/report.html"
    client = boto3.Session().client("s3")
    other, data = {"Bucket": "bucket", "Key": "other/object"}, {"Bucket": "data", "Key": "classes.txt"}
    forbidden = [
        (client.get_object, other),
        (client.put_object, other),
        (client.delete_object, other),
        (client.put_object, data),
        (client.delete_object, data),
        (client.put_object, {"Bucket": "bucket", "Key": "semiscale-else/object"}),
        (client.get_bucket_policy, {"Bucket": "bucket"}),
        (client.delete_bucket, {"Bucket": "bucket"}),
        (client.list_buckets, {}),
    ]
    for call, arguments in forbidden:
        with pytest.raises(ClientError, match="AccessDenied"):
            call(**arguments)
    client.close()
