"""The champion: one small object that names the model in use and those before it, switched in one step."""

from collections.abc import Callable

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.storage.documents import StrictDocument

MAX_CAS_ATTEMPTS = 8  # of processes that promote at the same moment, each wins once
MAX_HISTORY = 100  # former champions: 70 kB


class ChampionRecord(StrictDocument):
    """A model as the champion: its checkpoint, the receipt of its training, the run it came from, since when and why.

    `since` is UTC, ISO 8601. `test` is the digest of the test split that `top1` was measured on.
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
    """The content of the object. `former` has the latest first; `withdrawn` are models that were rolled back."""

    current: ChampionRecord
    former: list[ChampionRecord]
    withdrawn: list[str]


def champion_uri(workdir: str, name: str) -> str:
    """Return where the champion of this name is kept."""
    return storage.join(workdir, "champions", f"{name}.json")


def update_champion(uri: str, change: Callable[[Champion | None], Champion | None]) -> Champion | None:
    """Replace the champion by what `change` makes of it, unless that is None; return what is there then.

    Readers see the old object or the new one. Where another process switches in between, `change` is asked again with
    what that one wrote.
    """
    for _ in range(MAX_CAS_ATTEMPTS):
        data = storage.read_or_none(uri)
        champion = _parsed(uri, data)
        changed = change(champion)
        if changed is None:
            return champion
        if storage.compare_and_swap(uri, data, changed.model_dump_json(indent=1).encode()):
            return changed
    raise SemiscaleError(f"{uri}: other processes changed it {MAX_CAS_ATTEMPTS} times in between; promote again")


def promote_record(champion: Champion | None, reign: ChampionRecord) -> Champion:
    """Let a model succeed the champion. One that was withdrawn before no longer is."""
    if champion is None:
        return Champion(current=reign, former=[], withdrawn=[])
    former = [champion.current, *champion.former][:MAX_HISTORY]
    return Champion(current=reign, former=former, withdrawn=_without(champion.withdrawn, reign.model))


def rollback_record(uri: str, champion: Champion | None) -> Champion:
    """Withdraw the champion for the one before it. Raises InvalidInputError where there is none."""
    if champion is None:
        raise InvalidInputError(f"{uri}: no champion yet; promote a run first")
    if not champion.former:
        raise InvalidInputError(
            f"{uri}: the champion, {champion.current.model} of run {champion.current.run!r}, is the first"
        )
    withdrawn = [champion.current.model, *_without(champion.withdrawn, champion.current.model)]
    return Champion(current=champion.former[0], former=champion.former[1:], withdrawn=withdrawn[:MAX_HISTORY])


def _without(models: list[str], model: str) -> list[str]:
    return [one for one in models if one != model]


def _parsed(uri: str, data: bytes | None) -> Champion | None:
    if data is None:
        return None
    try:
        return Champion.model_validate_json(data)
    except ValueError:
        raise InvalidInputError(f"{uri}: not a champion's object; was it written by another version?") from None
