"""`python -m thinet_deploy`: what `torchrun -m thinet_deploy` and `accelerate launch -m thinet_deploy` start."""

from .cli.app import main

if __name__ == "__main__":
    main()
