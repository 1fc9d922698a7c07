"""`python -m llm_gym.cli`."""

from llm_gym.cli.group import main

if __name__ == "__main__":
    main()
