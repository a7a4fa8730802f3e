"""Memory and speed of streamed pretraining. The numbers of `nbs/41_stream.ipynb`.

    python benchmarks/speed/streaming.py --data HAM10000/HAM10000_images_part_1

1. Memory: a list of a million paths, which name 200 real pictures over and over, read by one worker as `stream_dataloaders` does, the same as tar files (20,000 pictures), and the frame of `pretext_dataloaders`.
   Resident memory of the worker after 1,000 pictures and after --items, and of the main process. Pictures are stood in for by one that is decoded already, so that many go through.
2. Speed: pictures a second and core of the loader, from files as they are and from tar files with a shorter side of 160 pixels, and of a training step of the rotation pretext on the CPU.

Each part runs in a process of its own. The result goes to benchmarks/results/streaming.json.
"""
import argparse, datetime, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def rss(): return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20 # MiB


def files_of(a, n, folder=None):
    from skin_lesions.core import image_files
    files = image_files(folder or a.data)
    return [str(files[i % len(files)]) for i in range(n)]


def loaders(a, kind, root):
    from skin_lesions.pretext import pretext_dataloaders
    from skin_lesions.stream import stream_dataloaders, write_list, write_shards
    files, kw = files_of(a, 200), dict(num_workers=1, device='cpu')
    if kind == 'frame': return pretext_dataloaders([files[i % 200] for i in range(a.images)], 32, bs=50, **kw)
    if kind == 'list':
        write_list((files[i % 200] for i in range(a.images)), root/'list.txt')
        return stream_dataloaders(root/'list.txt', 32, bs=50, **kw)
    return stream_dataloaders(write_shards((files[i % 200] for i in range(20_000)), root/'tars', short=32), 32, bs=50, **kw)


def memory(a, kind, root):
    "Worker's memory after 1,000 pictures and after more, as the worker notes it"
    import numpy as np
    import skin_lesions.pretext as pretext, skin_lesions.stream as stream
    from fastai.vision.core import PILImage
    picture, count, log = PILImage.create(np.asarray(PILImage.create(files_of(a, 1)[0]).resize((64, 48)))), [0], root/'rss.txt'
    def opened(*_):
        count[0] += 1
        if count[0] in marks:
            with log.open('a') as f: f.write(f'{os.getpid()} {count[0]} {rss()}\n')
        return picture
    items = min(a.items, 19_000) if kind == 'tar' else a.items
    marks = {1000, items}
    stream.open_image = opened
    start = rss()
    if kind == 'frame':
        pretext.open_unlabelled = opened
    dls = loaders(a, kind, root)
    made = rss()
    batches, done = iter(dls.train), 0
    for b in batches:
        done += len(b[0])
        if done > items+100: break
    rows = [line.split() for line in log.read_text().splitlines()]
    worker = {int(n): float(m) for _, n, m in rows}
    assert len({pid for pid, *_ in rows}) == 1 and rows[0][0] != str(os.getpid())
    return dict(images=dls.train.n, main_before=start, main_with_loaders=made, main_after=rss(), worker={str(k): v for k, v in worker.items()}, growth=worker[items]/worker[1000])


def speed(a, kind, root):
    import torch
    from PIL import Image
    from skin_lesions.stream import stream_dataloaders, write_list, write_shards
    torch.set_num_threads(1)
    n, files = 1000, files_of(a, 1000, a.originals)
    write_list(files, root/'list.txt')
    bytes_ = sum(os.path.getsize(f) for f in files)/len(files)
    source = root/'list.txt'
    if kind == 'tar':
        source = write_shards(files, root/'tars', short=160)
        bytes_ = sum(os.path.getsize(f) for f in source)/len(files)
    dls = stream_dataloaders(source, 128, valid=source, num_workers=0, device='cpu', lighting=0)
    for _ in zip(range(2), dls.train): pass
    start = time.perf_counter()
    done = sum(len(b[0]) for b in dls.train)
    return dict(images_a_second_and_core=done/(time.perf_counter()-start), bytes_an_image=bytes_, images=n, pictures=f'{Image.open(files[0]).size[0]} x {Image.open(files[0]).size[1]} pixels')


def step(a, kind, root):
    "A training step of the rotation pretext"
    import torch
    from skin_lesions.pretext import rotation_learner
    from skin_lesions.stream import stream_dataloaders, write_list
    torch.set_num_threads(1)
    write_list(files_of(a, 200), root/'list.txt')
    learn = rotation_learner(stream_dataloaders(root/'list.txt', 128, valid=root/'list.txt', num_workers=0, device='cpu'))
    x = next(iter(learn.dls.train))[0]
    net, times = learn.model.train(), []
    for _ in range(5):
        start = time.perf_counter()
        net(x).square().mean().backward()
        times.append(time.perf_counter()-start)
    return dict(arch='tf_efficientnet_lite0', size=128, bs=len(x), threads=1, images_a_second=len(x)/sorted(times)[2])


PARTS = dict(memory=(memory, ('list', 'tar', 'frame')), speed=(speed, ('list', 'tar')), step=(step, ('rotation',)))


def main(a):
    if a.part:
        with tempfile.TemporaryDirectory() as root: print(json.dumps(PARTS[a.part][0](a, a.kind, Path(root))))
        return
    out = dict(date=str(datetime.date.today()), python=platform.python_version(), cores=os.cpu_count(), note=a.note)
    for part, (_, kinds) in PARTS.items():
        for kind in kinds:
            done = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--part', part, '--kind', kind, '--data', a.data, *(['--originals', a.originals] if a.originals else []), '--items', str(a.items), '--images', str(a.images)], capture_output=True, text=True)
            if done.returncode: sys.exit(done.stderr)
            out.setdefault(part, {})[kind] = json.loads(done.stdout.splitlines()[-1])
            print(part, kind, out[part][kind], flush=True)
    (REPO/'benchmarks'/'results'/'streaming.json').write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default=os.environ.get('HAM10000_DIR'), help='folder of pictures')
    p.add_argument('--originals', help='folder of pictures for the speed, as users download them; without it those of --data')
    p.add_argument('--images', type=int, default=10**6, help='length of the list')
    p.add_argument('--items', type=int, default=50_000, help='pictures to read')
    p.add_argument('--note', default='', help='conditions')
    p.add_argument('--part', choices=PARTS)
    p.add_argument('--kind')
    main(p.parse_args())
