"""Code shared by the command lines: a user's mistake becomes one message and an exit code.

0     success
1     an error in this project or in a package, with its traceback
2     bad input
3     the run diverged
4     another process of the same run died, stopped responding, left or never joined; if JAX detects that
      first, it aborts with 134
130   SIGINT (Ctrl-C) arrived, and everything is saved, unless a second SIGINT, 2 s later or more, ended the
      saving
140   SIGUSR2 (a scheduler's warning) arrived, likewise
143   SIGTERM arrived, likewise
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import sys
import sysconfig
import traceback

import absl
import ml_collections
from absl import app, flags, logging

from cnn_cases import settings, stopping
from cnn_cases.training import devices, loop, processes, runtime

_DETERMINISTIC = flags.DEFINE_bool(
    "deterministic",
    False,
    "Use only deterministic operations on a GPU; see runtime.make_deterministic.",
)

# Messages of absl and ml_collections about flags, and plainer replacements.
_PLAINER = (
    (
        r"flag --config=(\S+?):(\S*): .*get_config\(\) takes 0 positional arguments.*",
        r"--config=\1 has no choices, such as '\2'",
    ),
    (
        r"flag --(\S+?)=(\S+): Failed to parse .* as a ConfigDict.*",
        r"--\1=\2: \1 is a group of keys; did you mean --\1.name=\2?",
    ),
    (r"Error whilst parsing config file: (ValueError: )?", ""),
    (r"flag --(\S+)=None: Flag --\S+ must have a value other than None\.", r"--\1 is missing;"),
    (r"\('Non-boolean argument to boolean flag', '.*'\)", "must be true or false"),
    (r"^(flag --config\.\S+=.*: )invalid literal for int\(\) .*", r"\1must be an int"),
    (r"^(flag --config\.\S+=.*: )could not convert string to float: .*", r"\1must be a float"),
    (r"Configuration is not available .*Is a directory: '(.*)'", r"--config=\1 is a directory, not a file"),
)

# Seconds to wait for the other processes of a run: if all end, long enough for process 0 to save; after an
# error, which may affect one process alone, not long.
_ALL_END, _MAY_BE_ALONE = 600, 3


def run(main, takes_files=False):
    """Parses the flags, calls `main()`, or `main(files)` with the arguments after the flags, and exits."""

    def guarded(arguments):
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax logs a dozen lines for every save
        if arguments[1:] and not takes_files:
            _leave(f"error: unexpected arguments: {' '.join(arguments[1:])}", 2)
        signal.signal(signal.SIGTERM, _terminated)
        runtime.choose_cpu_flags()
        if _DETERMINISTIC.value:
            runtime.make_deterministic()
        runtime.collect_garbage_rarely()
        runtime.use_compilation_cache()
        try:
            main(*([arguments[1:]] if takes_files else []))
        except loop.DivergedError as error:
            _leave(f"error: {error}", 3, _ALL_END)
        except stopping.InterruptedRun as interruption:
            _leave(str(interruption), 128 + interruption.signal_number, _ALL_END)
        except KeyboardInterrupt:
            _leave_at_once("SIGINT", 130)
        except Exception as error:
            if processes.is_loss(error):
                processes.end_after_loss(processes.loss_in_words(error))
            refusal = devices.message_for_user(error)
            if refusal is None:
                if processes.is_one_of_several():  # they and Python's shutdown would wait for each other
                    traceback.print_exc()
                    _leave("error: see above", 1)
                raise
            logging.debug("where it was raised", exc_info=True)  # shown with --verbosity=1
            _leave(f"error: {refusal}", 2)
        processes.end_together(0, _ALL_END)

    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("cnn_cases."):  # absl's --help shows only those of the main module
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(guarded, flags_parser=_parse)


def _parse(arguments):
    for name in {"config", "workdir"} & set(flags.FLAGS):
        if not isinstance(flags.FLAGS[name], flags.MultiFlag):
            _check_once(name, arguments)  # absl takes the last
    try:
        rest = flags.FLAGS(arguments)
        for name in flags.FLAGS:
            if name.startswith("config.") and isinstance(flags.FLAGS[name], flags.MultiFlag):
                _check_once(name, arguments)  # a tuple, and ml_collections joins them
        if "config" in flags.FLAGS:
            # The placeholder for a missing file raises an error only on access.
            hasattr(flags.FLAGS.config, "to_dict")
    except SystemExit as leaving:  # absl's --help is no error
        asked = any(re.fullmatch(r"--?(help\w*|h|\?)", argument) for argument in arguments)
        sys.exit(0 if asked and leaving.code == 1 else leaving.code)
    except (flags.Error, OSError) as error:
        # ml_collections raises a new error of the same type, which fails where that takes more than a text.
        first = getattr(error.__context__, "__context__", None)
        if isinstance(first, json.JSONDecodeError | UnicodeError):
            _leave(f"error: {_plainer(_explained(first, arguments))}", 2)
        # The messages of ml_collections contain the whole traceback of an error in a config file and, for a
        # missing file, every place where it looked.
        not_found = r"(?s)Failed loading config file.*(No such file or directory: '.*')"
        if missing := re.search(not_found, str(error)):
            _leave(f"error: --config: {missing[1]}, seen from {os.getcwd()}", 2)
        head, *others = str(error).splitlines()
        _leave(f"error: {_plainer(f'{head} {others[-1].strip()}' if others else head)}", 2)
    except Exception as error:  # errors in a config file, and others that ml_collections does not handle
        _leave(f"error: {_plainer(_explained(error, arguments))}", 2)
    for name in {"workdir", "out"} & set(flags.FLAGS):
        flag = flags.FLAGS[name]
        several = isinstance(flag.value, list)  # the flag can be repeated
        given = flag.value if several else [flag.value]
        if name == "workdir" and "" in given:
            _leave("error: --workdir= names no directory", 2)  # it would mean the current one
        # A shell does not expand the ~ of --workdir=~/x.
        given = [value and os.path.expanduser(value) for value in given]
        flag.value = given if several else given[0]
    return rest


def _check_once(name, arguments):
    given = [one for one in arguments[1:] if re.match(rf"--?{re.escape(name)}(=|$)", one)]
    if len(given) > 1:
        _leave(f"error: --{name} is given more than once: {' '.join(given)}", 2)


def _plainer(message):
    for pattern, plainer in _PLAINER:
        message = re.sub(pattern, plainer, message)
    return message.removesuffix(";")


def _explained(error, arguments):
    """Describes an error in the config file or in an override of a key, in one line."""
    # With the standard library, where an error may be raised far from the line of the config that caused it.
    libraries = [str(pathlib.Path(library.__file__).parent) for library in (absl, ml_collections)]
    libraries += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename, error.lineno))
    of_config = [
        frame for frame in frames if not frame[0].startswith((*libraries, "<")) and frame[0] != __file__
    ]
    # As text, a KeyError has quotes and a SyntaxError its file and line.
    is_plain = not isinstance(error, KeyError | SyntaxError)
    reason = " ".join(str(error if is_plain or not error.args else error.args[0]).split())
    if of_config:
        path, line = of_config[-1]
        return f"{path}, line {line}: {type(error).__name__}: {reason}"
    # absl also takes the file as the argument after --config.
    joined = "\0".join(arguments).replace("\0--config\0", "\0--config=").split("\0")
    given = [one for one in joined if one.startswith("--config")]
    # ml_collections raises these for a missing key, and for a file without get_config.
    if isinstance(error, KeyError | AttributeError):
        with contextlib.suppress(AttributeError):
            return _unknown_key(given) or f"{' '.join(given)}: {reason}"
    return f"{' '.join(given)}: {reason}"


def _unknown_key(given):
    """Describes the first flag --config.<key> whose key the config lacks, in one line; None if all exist."""
    file = next((one.removeprefix("--config=") for one in given if one.startswith("--config=")), None)
    config = flags.FLAGS["config"].parser.parse(file) if file else None
    for argument in given if config else ():
        key = argument.partition("=")[0].removeprefix("--config").removeprefix(".")
        try:
            if key:
                settings.check_key(config, key)
        except ValueError as unknown:
            return f"{argument}: {unknown}"
    return None


def _terminated(*_):
    # During training, the loop installs its own handler, which saves.
    _leave_at_once("SIGTERM", 143)


def _leave_at_once(signal_name, code):
    # Nothing under way has to be finished, or a second signal asks not to. While JAX's threads are busy,
    # Python's own shutdown can end in a segmentation fault, as it did for one of 55 signals at random times.
    processes.tell(f"{signal_name}: stopped at once")
    processes.exit_at_once(code)


def _leave(message, code, patience_seconds=_MAY_BE_ALONE):
    processes.tell(message)
    processes.end_together(code, patience_seconds)
    sys.exit(code)
