from data_prep.verify.plain_where import failed_where, where_columns, where_reasons


def test_condition_that_left_out_no_cell_is_looked_at_too():
    dropped = ["below min_genes", "not where is_primary_data!=False"]
    reasons = where_reasons(dropped, "tissue = lung | liver; is_primary_data!=False;")
    assert where_columns(reasons) == ["is_primary_data", "tissue"]
    wanted = {"is_primary_data": "True", "tissue": "liver"}
    assert failed_where(reasons, wanted) == ""
    assert failed_where(reasons, wanted | {"tissue": "skin"}) == "not where tissue = lung | liver"
    assert failed_where(reasons, wanted | {"is_primary_data": "0"}) == dropped[1]
