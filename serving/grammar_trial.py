"""Run as a program of its own: compiles the grammars that come as lines of JSON, and says with an empty line that it is ready."""

from __future__ import annotations

import json
import sys

from llguidance import LLMatcher, LLParserLimits


def main() -> None:
    print(flush=True)
    for line in sys.stdin:
        LLMatcher.validate_grammar(json.loads(line), limits=LLParserLimits(verbose_errors=False))
        print(flush=True)


if __name__ == "__main__":
    main()
