"""What the hub and the network answer, as one line that says what to change."""

from collections.abc import Iterator
from contextlib import contextmanager

from persona_probe.errors import InputError

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into `InputError`; tokens are in none of its messages, and in none of ours."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{repo!r} is no repository's id: write OWNER/NAME") from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"the hub needs an access token: {LOGIN}") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo} has no such revision: check --revision") from error
    except GatedRepoError as error:
        raise InputError(f"{repo} is gated: ask for access on its page, and {LOGIN}") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"no repository {repo}, or no access to it: check the name, or {LOGIN}") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        cure = LOGIN if code in (401, 403) else "try again later"
        raise InputError(f"the hub refused {repo} (HTTP {code}): {cure}") from error
    except Exception as error:
        # Its HTTP library has had two names, and a missing file on the way is an error of a third kind.
        of_network = type(error).__module__.partition(".")[0] in ("httpx", "httpx2")
        if not (of_network or isinstance(error, (LocalEntryNotFoundError, ConnectionError))):
            raise
        kind = type(error).__name__
        raise InputError(f"the hub does not answer ({kind}): check the network and HF_ENDPOINT") from error
