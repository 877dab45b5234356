"""Read and replace the champion.

The object of a champion names the model in use and its predecessors.
"""

from collections.abc import Callable

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.storage.documents import StrictDocument

# Of processes that promote at the same time, each wins one compare-and-swap.
MAX_CAS_ATTEMPTS = 8
# Former champions and withdrawn models that are kept, about 70 kB.
MAX_HISTORY = 100


class ChampionRecord(StrictDocument):
    """Model that is or was the champion.

    Attributes:
        model: Digest of the training.
        checkpoint: URI of the checkpoint.
        training: URI of the training receipt.
        run: Name of the run.
        test: Digest of the test split that `top1` was measured on.
        top1: Accuracy on the test split, in [0, 1].
        since: Time of promotion in UTC, ISO 8601.
        why: Reason of the promotion.
    """

    model: str
    checkpoint: str
    training: str
    run: str
    test: str
    top1: float
    since: str
    why: str


class Champion(StrictDocument):
    """Content of the champion's object.

    Attributes:
        current: Model in use.
        former: Former champions, latest first.
        withdrawn: Models that were rolled back.
    """

    current: ChampionRecord
    former: list[ChampionRecord]
    withdrawn: list[str]


def champion_uri(workdir: str, name: str) -> str:
    """Return the URI of a champion.

    Args:
        workdir: URI of the workdir.
        name: Name of the champion.
    """
    return storage.join(workdir, "champions", f"{name}.json")


def update_champion(uri: str, change: Callable[[Champion | None], Champion | None]) -> Champion | None:
    """Replace the champion by compare-and-swap.

    Readers see the old object or the new one. If another process changes it in between, `change` is called again with
    the new content.

    Args:
        uri: URI of the champion.
        change: Returns the new champion, or None to keep the current one.

    Returns:
        The champion afterwards, or None if there is none.

    Raises:
        InvalidInputError: The object is not a champion (SEMI-E343).
        SemiscaleError: Other processes changed it MAX_CAS_ATTEMPTS times (SEMI-E340).
    """
    for _ in range(MAX_CAS_ATTEMPTS):
        data = storage.read_or_none(uri)
        champion = _parse_champion(uri, data)
        changed = change(champion)
        if changed is None:
            return champion
        if storage.compare_and_swap(uri, data, changed.model_dump_json(indent=1).encode()):
            return changed
    raise SemiscaleError(
        "SEMI-E340", f"{uri}: Other processes changed the champion {MAX_CAS_ATTEMPTS} times. Promote again."
    )


def promote_record(champion: Champion | None, record: ChampionRecord) -> Champion:
    """Return the champion after a promotion.

    The promoted model is no longer withdrawn.

    Args:
        champion: Current champion, or None.
        record: Record of the promoted model.

    Returns:
        The new champion. The current one becomes its first predecessor.
    """
    if champion is None:
        return Champion(current=record, former=[], withdrawn=[])
    former = [champion.current, *champion.former][:MAX_HISTORY]
    return Champion(current=record, former=former, withdrawn=_without(champion.withdrawn, record.model))


def rollback_record(uri: str, champion: Champion | None) -> Champion:
    """Return the champion after a rollback to its predecessor.

    Args:
        uri: URI of the champion, for errors.
        champion: Current champion, or None.

    Returns:
        The new champion. The model that was rolled back is withdrawn.

    Raises:
        InvalidInputError: There is no champion (SEMI-E341), or it has no predecessor (SEMI-E342).
    """
    if champion is None:
        raise InvalidInputError("SEMI-E341", f"{uri}: There is no champion. Promote a run first.")
    if not champion.former:
        raise InvalidInputError(
            "SEMI-E342",
            f"{uri}: The champion, {champion.current.model} of run {champion.current.run!r}, has no predecessor. "
            "Promote another run.",
        )
    withdrawn = [champion.current.model, *_without(champion.withdrawn, champion.current.model)]
    return Champion(current=champion.former[0], former=champion.former[1:], withdrawn=withdrawn[:MAX_HISTORY])


def _without(models: list[str], model: str) -> list[str]:
    return [other for other in models if other != model]


def _parse_champion(uri: str, data: bytes | None) -> Champion | None:
    if data is None:
        return None
    try:
        return Champion.model_validate_json(data)
    except ValueError:
        raise InvalidInputError(
            "SEMI-E343", f"{uri}: The object is not a champion. Restore it, or use the version that wrote it."
        ) from None
