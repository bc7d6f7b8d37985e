"""versions, tag, drop and gc."""


class TestVersions:
    def test_versions_are_listed_with_their_tags(self, tiercache, photos, data_set):
        tiercache("pack", photos, data_set, "--mode", "overwrite", "--include", "cat")
        tiercache("tag", data_set, "first", "--at", "1")
        *versions, summary = tiercache("versions", data_set, "--json").events
        assert [(v["version"], v["kind"], v["records"], v["tags"]) for v in versions] == [
            (1, "create", 20, ["first"]),
            (2, "overwrite", 10, []),
        ]
        assert summary == {"event": "summary", "versions": 2}
        assert tiercache("versions", data_set).out.splitlines()[1].endswith(" KiB  first")

    def test_a_tag_is_accepted_wherever_a_version_is(self, tiercache, photos, data_set):
        tiercache("pack", photos, data_set, "--mode", "overwrite", "--include", "cat")
        assert tiercache("tag", data_set, "all", "--at", "1").out == "all is version 1\n"
        assert tiercache("info", data_set, "--at", "all", "--json").events[0]["records"] == 20
        assert tiercache("head", data_set, "--at", "all").out.endswith("of 20 records\n")
        assert tiercache("verify", data_set, "--at", "all", "--json").events[-1]["findings"] == 0
        assert "no tag 'al'; did you mean 'all'?" in tiercache("info", data_set, "--at", "al", code=1).err

    def test_a_tag_is_moved_with_replace_and_deleted_with_delete(self, tiercache, photos, data_set):
        tiercache("pack", photos, data_set, "--mode", "append")
        tiercache("tag", data_set, "best", "--at", "1")
        assert "move it with --replace" in tiercache("tag", data_set, "best", code=1).err
        assert tiercache("tag", data_set, "best", "--replace").out == "best is version 2\n"
        assert tiercache("tag", data_set, "best", "--delete").out == "deleted the tag best of version 2\n"
        assert "no tag 'best'" in tiercache("tag", data_set, "best", "--delete", code=1).err


class TestDrop:
    def test_records_and_columns_are_dropped_in_new_versions(self, tiercache, data_set):
        before = tiercache("info", data_set, "--json").events[0]
        names = [column["name"] for column in before["columns"]]
        assert names == ["image", "label", "path"]
        dry = tiercache("drop", data_set, "--where", "label == 0", "--dry-run")
        assert dry.out.startswith("would drop 10 records: ")
        assert tiercache("info", data_set, "--json").events[0] == before
        done = tiercache("drop", data_set, "--where", "label == 0 and path != 'x'", "--json").events[-1]
        assert (done["version"], done["dropped"], done["columns"]) == (2, 10, [])
        assert tiercache("drop", data_set, "--column", "path").out.endswith("; version 3 has 10 records\n")
        after = tiercache("info", data_set, "--json").events[0]
        assert ([column["name"] for column in after["columns"]], after["kind"]) == (names[:2], "drop")
        records = [e["record"] for e in tiercache("head", data_set, "-n", "20", "--json").events[:-1]]
        assert [record["label"] for record in records] == [1] * 10
        assert tiercache("verify", data_set, "--json").events[-1]["damaged"] == 0

    def test_if_nothing_matches_it_says_so(self, tiercache, data_set):
        found = tiercache("drop", data_set, "--where", "label in (7, 8)")
        assert found.out == "no record matches: version 1 stays the newest\n"

    def test_errors_name_the_flags_and_the_place(self, tiercache, data_set):
        errors = {
            (): "nothing to drop: give a condition (--where) or names of columns (--column)",
            ("--where", "label = 3"): "--where: invalid syntax",
            ("--where", "label == 3 | True"): "--where: '3 | True' at character 10: write `or`",
        }
        for arguments, message in errors.items():
            assert message in tiercache("drop", data_set, *arguments, code=2).err
        assert "no such column" in tiercache("drop", data_set, "--where", "labl == 3", code=1).err
        assert "column 'labl': no such column" in tiercache("drop", data_set, "--column", "labl", code=1).err


class TestGc:
    def test_gc_removes_old_versions_and_what_only_they_need(self, tiercache, photos, data_set):
        tiercache("pack", photos, data_set, "--mode", "overwrite", "--include", "cat")
        shards = set(data_set.glob("shards/*"))
        kept = tiercache("gc", data_set, "--keep-versions", "1", "--json").events[-1]
        assert (kept["versions"], kept["shards"], set(data_set.glob("shards/*"))) == (0, 0, shards)
        dry = tiercache("gc", data_set, "--keep-versions", "1", "--older-than", "0s", "--dry-run").out.splitlines()
        assert dry[0] == "version 1"
        assert dry[-1].startswith("would remove 1 version, 3 shards, 1 segment, 0 unfinished uploads, ")
        assert set(data_set.glob("shards/*")) == shards
        done = tiercache("gc", data_set, "--keep-versions", "1", "--older-than", "0s", "--json").events
        assert [e["name"] for e in done if e.get("kind") == "version"] == [1]
        assert (done[-1]["versions"], done[-1]["shards"], done[-1]["segments"]) == (1, 3, 1)
        assert len(set(data_set.glob("shards/*"))) == len(shards) - 3
        assert tiercache("verify", data_set, "--json").events[-1]["damaged"] == 0
        assert "version 1 was deleted" in tiercache("info", data_set, "--at", "1", code=1).err

    def test_a_tag_keeps_its_version(self, tiercache, photos, data_set):
        tiercache("pack", photos, data_set, "--mode", "overwrite", "--include", "cat")
        tiercache("tag", data_set, "all", "--at", "1")
        done = tiercache("gc", data_set, "--keep-versions", "1", "--older-than", "0s", "--json").events[-1]
        assert (done["versions"], done["shards"]) == (0, 0)

    def test_wrong_values_name_their_flags(self, tiercache, data_set):
        assert "--older-than: not a duration: 'soon'" in tiercache("gc", data_set, "--older-than", "soon", code=2).err
        assert "no data set here" in tiercache("gc", data_set.parent, code=1).err
