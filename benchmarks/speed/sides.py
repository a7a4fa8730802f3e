"""Two ways of doing one thing, timed alternately.

Each side is a process of its own, so that neither's settings reach the other.
"""
import atexit, json, multiprocessing, statistics, traceback
from importlib import import_module


def serve(pipe, module, name, kwargs):
    "Build one side, then run it whenever asked; a side is a function that returns a rate, or seconds"
    # data-loading workers start as the system starts them, not as this process was started
    multiprocessing.set_start_method(None, force=True)
    try:
        run = getattr(import_module(module), name)(**kwargs)
        pipe.send('ready')
        while pipe.recv() == 'run': pipe.send(run())
    except Exception: pipe.send(traceback.format_exc())


class Side:
    "A process that runs one side: a function of a script in this folder"
    def __init__(self, module, name, **kwargs):
        context = multiprocessing.get_context('spawn')
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=serve, args=(child_pipe, module, name, kwargs))
        self.process.start()
        atexit.register(self.process.kill)  # where the other side fails
        self._answer()

    def _answer(self):
        while not self.pipe.poll(5):
            if not self.process.is_alive():
                raise RuntimeError(f'a side ended with exit code {self.process.exitcode}')
        answer = self.pipe.recv()
        if isinstance(answer, str) and answer != 'ready': raise RuntimeError(answer)
        return answer

    def __call__(self):
        self.pipe.send('run')
        return self._answer()

    def close(self):
        self.pipe.send('end')
        self.process.join()


def in_turn(ours, theirs, repeats):
    "Medians of both sides and of the ratio of each pair, with its extremes; the first pair warms up and does not count"
    pairs = [(ours(), theirs()) for _ in range(repeats + 1)][1:]
    ratios = sorted(a/b for a, b in pairs)
    return dict(ours=statistics.median(a for a, _ in pairs), theirs=statistics.median(b for _, b in pairs),
                ratio=statistics.median(ratios), lowest=ratios[0], highest=ratios[-1], pairs=repeats)


def report(what, against, goal, unit, found):
    "Print a row for people, and as JSON for `run_all.py`"
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
    row = dict(what=what, against=against, goal=goal, unit=unit, **rounded)
    print(f"{what}: {found['ours']:.4g} against {found['theirs']:.4g} {unit}, ratio {found['ratio']:.2f} "
          f"(from {found['lowest']:.2f} to {found['highest']:.2f} in {found['pairs']} pairs); goal {goal}", flush=True)
    print('JSON ' + json.dumps(row), flush=True)
