def test_x(finished_run):
    print(list(finished_run.iterdir()), (finished_run/"run.json").read_text(), (finished_run/"predictions.csv").read_text(), (finished_run/"cohort.csv").read_text())
    assert 0
