"""Everything that is measured with the packaged network, one after another.

    HAM10000_DIR=... python benchmarks/packaged.py --bundle runs/bundle --milk10k MILK10K

Puts a bundle of `skin_lesions reproduce-bundle` into the package, runs the scripts whose results belong to that
network, and writes what other collections say of it into the bundle and its card. A step that has run for these weights
is not run again. At the end it prints the pages to execute anew. An hour of two cores.
"""
import argparse, json, os, shutil, subprocess, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS, REPO = HERE/'results', HERE.parent
PACKAGED = REPO/'skin_lesions'/'bundles'/'ham10000'
PAGES = ('55', '62', '63', '65', '66', '68', '73', '75', '76', '80', '90', '95', '96', 'index')
# rows of the card, by what was trained and what it was tested on
NAMES = {('one network of a fold', 'HAM10000'): 'HAM10000, one network',
         ('one network of a fold', 'MILK10k'): 'MILK10k, one network',
         ('packaged network', 'MILK10k'): 'MILK10k, lesions that none was trained on, all networks'}


def run(script, *args):
    "A script in a process of its own"
    print('==', script, *args, flush=True)
    subprocess.run([sys.executable, '-W', 'ignore', str(REPO/script), *map(str, args)], check=True)


def put_in(bundle):
    "The bundle's two files and its card, and what its networks said of lesions held out from them"
    import pandas as pd
    for name in ('bundle.json', 'model.safetensors', 'README.md'): shutil.copyfile(bundle/name, PACKAGED/name)
    held_out = pd.read_csv(bundle/'held_out_predictions.csv')
    packed = dict(index=False, float_format='%.5f', compression=dict(method='gzip', mtime=0))
    held_out.to_csv(RESULTS/'packaged_held_out.csv.gz', **packed)


def weights():
    "What identifies the packaged network"
    return json.loads((PACKAGED/'bundle.json').read_text())['sha256']


def was_looked_at():
    "Whether the challenge's validation images were shown to it"
    looks = json.loads((RESULTS/'challenge.json').read_text())['looks']
    return any(look['sha256'] == weights() for look in looks)


def held_out_subgroups(milk10k):
    "Held-out scores by collection, age, sex and anatomical site, from the stored predictions"
    import pandas as pd
    from skin_lesions.bundle import read_bundle
    from skin_lesions.classes import ClassSet, with_classes
    from skin_lesions.readers import read_metadata
    from skin_lesions.reproduce import subgroup_scores
    classes = ClassSet.from_dict(read_bundle(PACKAGED)['classes'])
    table = with_classes(pd.read_csv(RESULTS/'packaged_held_out.csv.gz', dtype=dict(group=str)), classes)
    folders = dict(HAM10000=os.environ['HAM10000_DIR'], MILK10k=milk10k)
    frames = [read_metadata(folder).assign(collection=name) for name, folder in folders.items()]
    meta = pd.concat([f[['image_id', 'collection', 'age', 'sex', 'site']] for f in frames], ignore_index=True)
    return subgroup_scores(table, meta.drop_duplicates('image_id'))


def left_out():
    "What `variants.py` measured of networks without a source"
    found = json.loads((RESULTS/'variants.json').read_text())['left_out']
    rows = [dict(name=source, images=r['images'], macro_auc=r['macro_auc'], difference=r['difference']['macro_auc'])
            for source, r in found.items()]
    return dict(about='other networks of the same recipe after its first step, one random seed', rows=rows)


def of_a_mean():
    "What `variants.py` measured of the mean of three networks, on lesions of HAM10000 that none of them has seen"
    row = json.loads((RESULTS/'variants.json').read_text())['rows']['full_mean']['HAM10000']
    ends = dict(accuracy=row['accuracy'], average_recall=row['by_rule'], macro_auc=row['macro_auc'])
    values = {f'{k}{end}': v for k, found in ends.items() for end, v in zip(('', '_low', '_high'), found)}
    name = 'HAM10000, lesions that none was trained on, mean of three other networks of this recipe'
    return dict(name=name, images=row['images'], lesions=row['lesions']) | values


def onto_card(milk10k):
    "Rows of other collections, of sources left out and of subgroups onto the card"
    from skin_lesions.bundle import read_bundle, update_bundle
    from skin_lesions.card import model_card
    rows = json.loads((RESULTS/'cross_collection.json').read_text())['rows']
    wanted = ('images', 'lesions', 'outside', 'accuracy', 'average_recall', 'macro_auc', 'malignant_referred',
              'benign_kept', 'calibration', 'outside_referred', 'outside_ood')
    keys = [f'{k}{end}' for k in wanted for end in ('', '_low', '_high')]
    def row(r): return dict(name=NAMES[r['trained'], r['tested']]) | {k: r[k] for k in keys if k in r}
    others = [row(r) for r in rows if (r['trained'], r['tested']) in NAMES]
    others.insert(1, of_a_mean())
    measured = dict(collections=others, left_out=left_out(), subgroups=held_out_subgroups(milk10k))
    update_bundle(PACKAGED, scores=read_bundle(PACKAGED)['scores'] | measured)
    (PACKAGED/'README.md').write_text(model_card(read_bundle(PACKAGED)), encoding='utf-8')


def main(args):
    if args.bundle: put_in(Path(args.bundle))
    data = os.environ['HAM10000_DIR']
    if not was_looked_at(): run('benchmarks/challenge.py')
    run('benchmarks/cross_collection.py', '--milk10k', args.milk10k)
    onto_card(args.milk10k)
    run('benchmarks/conformal.py', '--data', data, '--milk10k', args.milk10k)
    run('benchmarks/benefit.py')
    run('benchmarks/robustness.py', '--out', Path(args.work)/f'robustness-{weights()[:12]}')
    run('tools/make_examples.py', '--data', data)
    pages = ', '.join(p.name for n in PAGES for p in sorted((REPO/'nbs').glob(f'{n}*.ipynb')))
    print(f'Execute anew, and read: {pages}; then python tools/readme.py')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--bundle', help='folder of the new bundle; without it, the packaged one is measured again')
    parser.add_argument('--milk10k', required=True, help='folder of MILK10k')
    parser.add_argument('--work', default='runs', help='folder for what is finished')
    main(parser.parse_args())
