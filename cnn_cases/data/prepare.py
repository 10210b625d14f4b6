"""Downloads and prepares TFDS sets: `python -m cnn_cases.data.prepare mnist cifar10 [--data_dir=DIR]`."""

import argparse
import sys

from cnn_cases.data import sources


def main(arguments=None):
    """Prepares the data sets named on the command line; exits with one message if that fails."""
    parser = argparse.ArgumentParser(prog="python -m cnn_cases.data.prepare", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="a TFDS data set")
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    options = parser.parse_args(arguments)
    for name in options.names:
        try:
            builder = sources.prepare(name, options.data_dir)
        except (ValueError, ConnectionError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"{name} is not prepared; the same command goes on with it", file=sys.stderr)
            sys.exit(130)
        print(f"{name} is prepared in {builder.data_path}")


if __name__ == "__main__":
    main()
