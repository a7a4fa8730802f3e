"""Processes that wait for no imports: a server imports the libraries once, for all test processes, and forks for each command.

A fork has its own arguments, folder, environment, output, exit status and signals, and imports skin_lesions itself. What a first import promises
(which libraries it waits for, what it changes) needs the `python` of `conftest.py`, a new interpreter."""
import json, os, signal, socket, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path

try: import fcntl
except ModuleNotFoundError: fcntl = None

@contextmanager
def locked(path):
    "One test process at a time; on Windows, where there is no such lock, none waits"
    with open(path, 'w') as lock:
        if fcntl: fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ended(child, seconds=300):
    """The exit status of a process of `multiprocessing` that leads a process group; what it leaves behind is killed.

    `Process.join` waits for that too, for it holds the sentinel; and the worker of a loader whose parent ends while it starts takes
    the next parent for its own, and never ends."""
    end = time.monotonic()+seconds
    while child.exitcode is None and time.monotonic() < end: time.sleep(.01)
    try: os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError: pass # it left nothing, or was killed before it led a group
    return child.exitcode


SERVER = r'''
import gc, json, os, runpy, select, selectors, signal, socket, sys, tempfile, types
import fastai.vision.all, matplotlib.pyplot, numpy, pandas, scipy.stats, sklearn.metrics, timm, torch, torchvision
assert not any(n.split('.')[0] == 'skin_lesions' for n in sys.modules)
gc.freeze() # or the collector writes to every page of memory that a fork shares

def serve(listener):
    "Answer until a command comes, whose fork returns with it"
    clients = selectors.DefaultSelector()
    clients.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in clients.select():
            sock = key.fileobj
            if sock is listener:
                clients.register(sock.accept()[0], selectors.EVENT_READ)
                continue
            text, outputs, _, _ = socket.recv_fds(sock, 2**20, 2)
            if not text: # these tests have ended
                clients.unregister(sock)
                sock.close()
                if len(clients.get_map()) == 1 and not select.select([listener], [], [], 0)[0]: os._exit(0)
                continue
            request = json.loads(text)
            if 'poll' in request:
                pid, status = os.waitpid(request['poll'], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            else: answer = os.fork()
            if answer == 0 and 'args' in request:
                for other in [key.fileobj for key in clients.get_map().values()]: other.close()
                clients.close()
                return request, outputs
            for output in outputs: os.close(output)
            sock.send(json.dumps(answer).encode())

request, outputs = serve(socket.socket(fileno=int(sys.argv[1])))
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background job ignores Ctrl-C and hands that on
for to, output in enumerate(outputs, 1): os.dup2(output, to); os.close(output)
os.chdir(request['cwd'])
os.environ.clear(); os.environ.update(request['env'])
tempfile.tempdir = None # TMPDIR may be another
kind, what, *sys.argv[1:] = request['args']
sys.argv[0], sys.path[0] = kind, ''
__import__('random').seed(); numpy.random.seed()
if kind == '-m': runpy.run_module(what, run_name='__main__', alter_sys=True)
else:
    sys.modules['__main__'] = types.ModuleType('__main__')
    exec(compile(what, '<string>', 'exec'), vars(sys.modules['__main__']))
'''


class Child:
    "A command that runs: what is needed of `subprocess.Popen`"
    def __init__(self, server, pid): self.server, self.pid, self.returncode = server, pid, None

    def poll(self):
        if self.returncode is None: self.returncode = self.server.ask(dict(poll=self.pid))
        return self.returncode

    def wait(self, timeout=400):
        end = time.monotonic()+timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(self.pid, timeout)
            time.sleep(.02)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def kill(self): self.send_signal(signal.SIGKILL)


class Server:
    "Starts with the first command of any test process, and ends with the last of them"
    def __init__(self, address): self.address, self.sock = Path(address), None # a file; beside it, a lock

    def connect(self):
        with locked(self.address.with_suffix('.lock')): # only one starts it
            self.sock = socket.socket(socket.AF_UNIX)
            try: self.sock.connect(str(self.address))
            except OSError: # not started, or ended
                self.address.unlink(missing_ok=True)
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(str(self.address))
                    listener.listen()
                    self.process = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', SERVER, str(listener.fileno())], pass_fds=[listener.fileno()])
                self.sock.connect(str(self.address))

    def ask(self, request, outputs=()):
        socket.send_fds(self.sock, [json.dumps(request).encode()], outputs)
        return json.loads(self.sock.recv(99))

    def start(self, *args, cwd, out, err):
        "Run `python ARGS` (-c CODE ... or -m MODULE ...) in a folder, its outputs into open files"
        if self.sock is None: self.connect()
        request = dict(args=list(map(str, args)), cwd=str(cwd), env=dict(os.environ))
        return Child(self, self.ask(request, [out.fileno(), err.fileno()]))

    def run(self, *args, cwd, timeout=400):
        "The finished process of `python ARGS`"
        with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
            child = self.start(*args, cwd=cwd, out=out, err=err)
            child.wait(timeout)
            for f in (out, err): f.seek(0)
            return subprocess.CompletedProcess(args, child.returncode, out.read(), err.read())

    def close(self):
        if self.sock is not None: self.sock.close()
