"""Test the S3 permissions of overlays/plain-s3: enough for a run, none outside its workdir."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from semiscale import storage
from tests.conftest import use
from tests.support import sample_images
from tests.support.servers import serve_store
from tests.support.stages import Stages

pytestmark = pytest.mark.slow

POLICY = Path(__file__).resolve().parents[2] / "manifests" / "overlays" / "plain-s3" / "s3-policy.json"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A run file, its data in a bucket, and an S3 server that from here on allows this process what the policy does."""
    nowhere = str(tmp_path / "none")
    files = {"AWS_CONFIG_FILE": nowhere, "AWS_SHARED_CREDENTIALS_FILE": nowhere, "AWS_DEFAULT_REGION": "us-east-1"}
    key = {"AWS_ACCESS_KEY_ID": "admin", "AWS_SECRET_ACCESS_KEY": "admin"}
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with serve_store("s3") as address:
        use(monkeypatch, {**files, **key, "AWS_ENDPOINT_URL": address, "NO_PROXY": "127.0.0.1"})
        content = written(tmp_path)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers the keys
        use(monkeypatch, access_key(POLICY.read_text().replace("DATA", "data").replace("BUCKET", "bucket")))
        enforce = urllib.request.Request(f"{address}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
        with urllib.request.urlopen(enforce):
            yield content
        storage._open_store.cache_clear()


def written(folder: Path) -> dict[str, Any]:
    """Write the data to a bucket, and something else to that of the workdir; returns the run file."""
    session = boto3.Session().client("s3")
    for bucket in ("data", "bucket"):
        session.create_bucket(Bucket=bucket)
    session.put_object(Bucket="bucket", Key="other/object", Body=b"of somebody else")
    session.close()
    content = sample_images.write_run(folder)
    for path in (folder / "data").rglob("*.*"):
        storage.upload(path, f"s3://data/{path.relative_to(folder / 'data')}")
    places = {
        name: [uri.replace(str(folder / "data"), "s3://data") for uri in value]
        for name in ("labeled", "validation", "test", "unlabeled")
        if isinstance(value := content[name], list)
    }
    return {**content, **places, "classes": "s3://data/classes.txt", "workdir": "s3://bucket/semiscale"}


def access_key(policy: str) -> dict[str, str]:
    """Return the keys of a user who may do what a policy says."""
    iam = boto3.Session().client("iam")
    iam.create_user(UserName="run")
    iam.put_user_policy(UserName="run", PolicyName="semiscale", PolicyDocument=policy)
    key = iam.create_access_key(UserName="run")["AccessKey"]
    iam.close()
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


def test_a_run_does_all_of_it_with_its_rights_and_nothing_outside_its_workdir(
    run: dict[str, Any], tmp_path: Path
) -> None:
    stages = Stages(tmp_path, **{name: value for name, value in run.items() if "s3://" in str(value)})
    assert stages.report.report == "s3://bucket/semiscale/trial/report.html"
    client = boto3.Session().client("s3")
    other, data = {"Bucket": "bucket", "Key": "other/object"}, {"Bucket": "data", "Key": "classes.txt"}
    tried = [
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
    for act, asked in tried:
        with pytest.raises(ClientError, match="AccessDenied"):
            act(**asked)
    client.close()
