"Tables that people hand to a command: refused with the file, the row and the reason."
import pytest

from skin_lesions.classes import HAM10000

CODES = list(HAM10000.codes)


def put(folder, data, name='HAM10000_metadata.csv'):
    (folder/name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder/name


def test_the_command_names_file_and_row(tmp_path, capsys):
    from skin_lesions.cli import main
    file = put(tmp_path, ','.join(['image_id', *CODES]) + '\na,0,0,0,0,0,1,0\nb,0,0,0,0,2,1,0\n', 'p.csv')
    for args in (['evaluate', file], ['submit', file, '--out', tmp_path/'s.csv'], ['ensemble', file, file.with_name('q.csv'), '--out', tmp_path/'e.csv']):
        if args[0] == 'ensemble': (tmp_path/'q.csv').write_bytes(file.read_bytes())
        assert main([str(a) for a in args]) == 2
        said = capsys.readouterr().err
        assert str(file) in said and 'row 1 ' in said and "'b'" in said and said.count('\n') == 1, said


def test_a_patient_in_two_rows_is_refused(tmp_path):
    from skin_lesions.cli import read_patients
    put(tmp_path, 'image_id;age\n01;50\n02;60\n', 'p.csv')
    assert read_patients(tmp_path/'p.csv').values.tolist() == [['01', 50], ['02', 60]]
    put(tmp_path, 'image_id;age\n01;50\n01;60\n', 'p.csv')
    with pytest.raises(ValueError, match="p.csv: image_id '01' is in two rows"): read_patients(tmp_path/'p.csv')
