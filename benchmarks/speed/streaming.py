"""Memory and speed of streamed pretraining. The numbers of `nbs/41_stream.ipynb`.

    python benchmarks/speed/streaming.py --data HAM10000/HAM10000_images_part_1

1. Memory: a list of a million paths, which name 200 real images over and over, read by one data-loading worker as
   `stream_dataloaders` does, the same as tar files (20,000 images), and the frame of `pretext_dataloaders`. Resident
   memory of the worker after 1,000 images and after --items, and of the main process. One decoded image replaces the
   files, so that many go through.
2. Speed: images a second and core of the loader, from files as they are and from tar files with a shorter side of 160
   pixels, and of a training step of the rotation pretext on the CPU.

Each part runs in a process of its own. The result goes to benchmarks/results/streaming.json.
"""
import argparse, datetime, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1]/'results'


def resident():
    "Resident memory of this process, MiB"
    return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20


def files_of(args, n, folder=None):
    "`n` paths, the files of the folder over and over"
    from skin_lesions.core import image_files
    files = image_files(folder or args.data)
    return [str(files[i % len(files)]) for i in range(n)]


def loaders(args, kind, root):
    from skin_lesions.pretext import pretext_dataloaders
    from skin_lesions.stream import stream_dataloaders, write_list, write_shards
    files, kwargs = files_of(args, 200), dict(bs=50, num_workers=1, device='cpu')
    if kind == 'frame': return pretext_dataloaders([files[i % 200] for i in range(args.images)], 32, **kwargs)
    if kind == 'list':
        write_list((files[i % 200] for i in range(args.images)), root/'list.txt')
        return stream_dataloaders(root/'list.txt', 32, **kwargs)
    shards = write_shards((files[i % 200] for i in range(20_000)), root/'tars', short=32)
    return stream_dataloaders(shards, 32, **kwargs)


def replace_opening(image, marks, log):
    "Give one image for every file, and note the memory of the process when a mark is reached"
    import skin_lesions.pretext as pretext, skin_lesions.stream as stream
    opened = 0

    def open_one(*_):
        nonlocal opened
        opened += 1
        if opened in marks:
            with log.open('a') as f: f.write(f'{os.getpid()} {opened} {resident()}\n')
        return image

    stream.open_image = pretext.open_unlabelled = open_one


def memory(args, kind, root):
    "The worker's memory after 1,000 images and after more, as the worker notes it"
    import numpy as np
    from fastai.vision.core import PILImage
    image = PILImage.create(np.asarray(PILImage.create(files_of(args, 1)[0]).resize((64, 48))))
    items, log = min(args.items, 19_000) if kind == 'tar' else args.items, root/'memory.txt'
    replace_opening(image, {1000, items}, log)
    before = resident()
    dls = loaders(args, kind, root)
    with_loaders, done = resident(), 0
    for batch in dls.train:
        done += len(batch[0])
        if done > items + 100: break
    after = resident()
    rows = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for pid, *_ in rows}) == 1 and rows[0][0] != str(os.getpid())
    worker = {n: float(mebibytes) for _, n, mebibytes in rows}
    return dict(images=dls.train.n, main_before=before, main_with_loaders=with_loaders, main_after=after,
                worker=worker, growth=worker[str(items)]/worker['1000'])


def speed(args, kind, root):
    "Images a second of the loader alone"
    import torch
    from PIL import Image
    from skin_lesions.stream import stream_dataloaders, write_list, write_shards
    torch.set_num_threads(1)
    files = files_of(args, args.epoch, args.originals)
    if kind == 'tar': source = stored = write_shards(files, root/'tars', short=160)
    else:
        source, stored = root/'list.txt', files
        write_list(files, source)
    dls = stream_dataloaders(source, 128, valid=source, num_workers=0, device='cpu', lighting=0)
    for _ in zip(range(2), dls.train): pass
    start = time.perf_counter()
    done = sum(len(batch[0]) for batch in dls.train)
    rate = done/(time.perf_counter() - start)
    width, height = Image.open(files[0]).size
    return dict(images_a_second_and_core=rate, bytes_an_image=sum(map(os.path.getsize, stored))/len(files),
                images=len(files), pictures=f'{width} x {height} pixels')


def step(args, kind, root):
    "A training step of the rotation pretext"
    import torch
    from skin_lesions.pretext import rotation_learner
    from skin_lesions.stream import stream_dataloaders, write_list
    torch.set_num_threads(1)
    write_list(files_of(args, 200), root/'list.txt')
    dls = stream_dataloaders(root/'list.txt', 128, valid=root/'list.txt', num_workers=0, device='cpu')
    learn = rotation_learner(dls)
    x = next(iter(learn.dls.train))[0]
    net, times = learn.model.train(), []
    for _ in range(5):
        start = time.perf_counter()
        net(x).square().mean().backward()
        times.append(time.perf_counter() - start)
    return dict(arch='tf_efficientnet_lite0', size=128, bs=len(x), threads=1, images_a_second=len(x)/sorted(times)[2])


PARTS = dict(memory=(memory, ('list', 'tar', 'frame')), speed=(speed, ('list', 'tar')), step=(step, ('rotation',)))


def measured(args, part, kind):
    "A part in a process of its own"
    command = [sys.executable, '-W', 'ignore', __file__, '--part', part, '--kind', kind, '--data', args.data,
               '--items', str(args.items), '--images', str(args.images), '--epoch', str(args.epoch)]
    if args.originals: command += ['--originals', args.originals]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(args):
    if args.part:
        with tempfile.TemporaryDirectory() as root: print(json.dumps(PARTS[args.part][0](args, args.kind, Path(root))))
        return
    out = dict(date=str(datetime.date.today()), python=platform.python_version(), cores=os.cpu_count(), note=args.note)
    for part, (_, kinds) in PARTS.items():
        for kind in kinds:
            out.setdefault(part, {})[kind] = measured(args, part, kind)
            print(part, kind, out[part][kind], flush=True)
    Path(args.out).write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default=os.environ.get('HAM10000_DIR'), help='folder of images')
    parser.add_argument('--originals', help='images for the speed, as users download them; without it those of --data')
    parser.add_argument('--images', type=int, default=10**6, help='length of the list')
    parser.add_argument('--items', type=int, default=50_000, help='images to read, 1,000 or more')
    parser.add_argument('--epoch', type=int, default=1000, help='images of the epoch whose speed is measured')
    parser.add_argument('--note', default='', help='conditions, for the result')
    parser.add_argument('--out', default=str(RESULTS/'streaming.json'), help='JSON to write')
    parser.add_argument('--part', choices=PARTS, help='one part alone, printed')
    parser.add_argument('--kind', help='of the part')
    main(parser.parse_args())
