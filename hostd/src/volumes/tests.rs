//! Volumes as plain directories, with every crash in between. The kernel tests do the same with real filesystems.

use flynn_api::ErrorCode;
use flynn_api::volume::Gc;

use super::record::UNFINISHED;
use super::*;

fn host() -> (tempfile::TempDir, Paths, Volumes) {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::at(dir.path());
    fs::create_dir(paths.volumes()).unwrap();
    let volumes = Volumes::open(&paths).unwrap();
    (dir, paths, volumes)
}

fn nobody(_: &str) -> Vec<String> {
    Vec::new()
}

fn wanted(id: &str) -> Wanted {
    let owner = (
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    Wanted {
        id: id.into(),
        owner,
        ..Wanted::default()
    }
}

fn ids(volumes: &Volumes) -> Vec<String> {
    let list = volumes.list(&nobody).unwrap();
    list.into_iter().map(|volume| volume.id).collect()
}

fn names(paths: &Paths) -> Vec<String> {
    let entries = fs::read_dir(paths.volumes()).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".flynn-provider")
        .collect();
    names.sort();
    names
}

#[test]
fn a_volume_is_made_once_and_goes_with_its_data() {
    let (_dir, paths, volumes) = host();
    let data = volumes.ensure(&wanted("one")).unwrap();
    fs::write(data.join("file"), "kept").unwrap();
    assert_eq!(volumes.ensure(&wanted("one")).unwrap(), data);
    assert!(data.join("file").exists());
    let user = |id: &str| vec![format!("{id}-user")];
    let listed = volumes.list(&user).unwrap();
    assert_eq!((listed.len(), listed[0].jobs[0].as_str()), (1, "one-user"));
    let busy = volumes.remove("one", &user).unwrap_err();
    assert!(
        busy.code == ErrorCode::Conflict && busy.message.contains("one-user"),
        "{busy}"
    );
    volumes.remove("one", &nobody).unwrap();
    assert_eq!(
        volumes.remove("one", &nobody).unwrap_err().code,
        ErrorCode::NotFound
    );
    assert_eq!(
        volumes.remove("../layers", &nobody).unwrap_err().code,
        ErrorCode::NotFound
    );
    assert_eq!(names(&paths), [""; 0]);
}

#[test]
fn what_a_crash_leaves_is_no_volume_and_is_swept() {
    let (_dir, paths, volumes) = host();
    volumes.ensure(&wanted("kept")).unwrap();
    // Made up to every step, and removed up to every step: all under a name that is no volume's.
    for (number, upto) in ["", "data", "data/half", "volume.json"].into_iter().enumerate() {
        let dir = paths.volumes().join(format!("{UNFINISHED}{number}"));
        fs::create_dir(&dir).unwrap();
        if upto == "volume.json" {
            fs::copy(paths.volumes().join("kept/volume.json"), dir.join(upto)).unwrap();
        } else if !upto.is_empty() {
            fs::create_dir_all(dir.join(upto)).unwrap();
        }
    }
    fs::create_dir(paths.volumes().join(".removed-of-an-older-release")).unwrap();
    let working = volumes
        .unfinished(volumes.pools().default().unwrap(), &[])
        .unwrap();
    fs::create_dir(&working.path).unwrap();
    assert_eq!(ids(&volumes), ["kept"]);
    volumes.sweep();
    // What somebody is at stays.
    assert_eq!(names(&paths).len(), 2);
    drop(working);
    assert_eq!(names(&paths), ["kept"]);
}

#[test]
fn a_volume_that_cannot_be_read_is_not_made_anew() {
    let (_dir, paths, volumes) = host();
    let data = volumes.ensure(&wanted("one")).unwrap();
    fs::write(data.join("file"), "kept").unwrap();
    let record = paths.volumes().join("one/volume.json");
    for broken in [Some("{\"ver"), None] {
        match broken {
            Some(text) => fs::write(&record, text).unwrap(),
            None => fs::remove_file(&record).unwrap(),
        }
        let error = volumes.ensure(&wanted("one")).unwrap_err();
        assert!(error.message.contains("cannot be read"), "{error}");
        assert!(volumes.remove("one", &nobody).is_err() && data.join("file").exists());
        assert!(ids(&volumes).is_empty());
    }
}

#[test]
fn a_missing_disk_is_no_empty_volume() {
    let (dir, paths, volumes) = host();
    let path = dir.path().join("disk");
    let new = NewProvider {
        id: "disk".into(),
        path: path.display().to_string(),
        default: true,
        ..NewProvider::default()
    };
    assert!(
        volumes
            .add_provider(&new)
            .unwrap_err()
            .message
            .contains("no directory")
    );
    fs::create_dir(&path).unwrap();
    volumes.add_provider(&new).unwrap();
    volumes.add_provider(&new).unwrap();
    let within = NewProvider {
        id: "within".into(),
        path: paths.volumes().display().to_string(),
        ..NewProvider::default()
    };
    assert!(
        volumes
            .add_provider(&within)
            .unwrap_err()
            .message
            .contains("default")
    );
    let data = volumes.ensure(&wanted("one")).unwrap();
    assert!(data.starts_with(&path));

    // The disk is not mounted: its mount point is there, and empty.
    let volumes = Volumes::open(&paths).unwrap();
    fs::rename(&path, dir.path().join("away")).unwrap();
    fs::create_dir(&path).unwrap();
    let error = volumes.ensure(&wanted("one")).unwrap_err();
    assert!(
        error.code == ErrorCode::Unavailable && error.message.contains("mount its disk"),
        "{error}"
    );
    assert_eq!(volumes.notices().len(), 1);
    assert!(ids(&volumes).is_empty() && names(&paths).is_empty());
    fs::remove_dir(&path).unwrap();
    fs::rename(dir.path().join("away"), &path).unwrap();
    assert_eq!(volumes.ensure(&wanted("one")).unwrap(), data);
    assert!(
        volumes
            .remove_provider("disk")
            .unwrap_err()
            .message
            .contains("delete them")
    );
    volumes.remove("one", &nobody).unwrap();
    volumes.remove_provider("disk").unwrap();
    assert!(
        volumes
            .ensure(&wanted("two"))
            .unwrap()
            .starts_with(paths.volumes())
    );
    assert!(volumes.remove_provider("default").is_err());
}

#[test]
fn the_own_disk_may_be_late_as_well() {
    let (dir, paths, volumes) = host();
    let data = volumes.ensure(&wanted("one")).unwrap();
    fs::write(data.join("file"), "kept").unwrap();
    let away = dir.path().join("away");
    fs::rename(paths.volumes(), &away).unwrap();
    fs::create_dir(paths.volumes()).unwrap();

    let volumes = Volumes::open(&paths).unwrap();
    let error = volumes.ensure(&wanted("one")).unwrap_err();
    assert!(error.message.contains("mount its disk"), "{error}");
    let new = NewVolume::default();
    assert_eq!(
        volumes.create("default", new).unwrap_err().code,
        ErrorCode::Unavailable
    );
    assert!(names(&paths).is_empty() && ids(&volumes).is_empty());
    // It comes while the daemon runs.
    fs::remove_dir(paths.volumes()).unwrap();
    fs::rename(&away, paths.volumes()).unwrap();
    assert_eq!(volumes.ensure(&wanted("one")).unwrap(), data);
    assert!(volumes.notices().is_empty());

    // An empty disk takes its place, as the operator wishes.
    fs::rename(paths.volumes(), &away).unwrap();
    fs::create_dir(paths.volumes()).unwrap();
    let again = NewProvider {
        id: "default".into(),
        path: paths.volumes().display().to_string(),
        ..NewProvider::default()
    };
    volumes.add_provider(&again).unwrap();
    assert!(!volumes.ensure(&wanted("one")).unwrap().join("file").exists());
}

#[test]
fn a_list_of_the_first_form_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::at(dir.path());
    for made in [paths.volumes(), dir.path().join("disk")] {
        fs::create_dir(made).unwrap();
    }
    let disk = dir.path().join("disk");
    fs::write(disk.join(".flynn-provider"), "{}").unwrap();
    let list = |version: u32| {
        let providers = serde_json::json!([{ "id": "disk", "kind": "dir", "path": disk }]);
        let list = serde_json::json!({ "version": version, "default": "disk", "providers": providers });
        fs::write(paths.providers(), list.to_string()).unwrap();
    };
    list(9);
    assert!(
        Volumes::open(&paths)
            .unwrap_err()
            .to_string()
            .contains("later release")
    );
    list(1);
    for _ in 0..2 {
        let volumes = Volumes::open(&paths).unwrap();
        assert_eq!(volumes.providers().len(), 2);
        assert!(volumes.ensure(&wanted("one")).unwrap().starts_with(&disk));
        assert!(paths.volumes().join(".flynn-provider").exists());
    }
}

#[test]
fn work_on_one_volume_holds_up_no_other() {
    let (_dir, _paths, volumes) = host();
    let busy = volumes.locks.lock(&["busy"]);
    std::thread::scope(|scope| {
        // For as long as that takes, a volume's own work waits, and nothing else does.
        let own = scope.spawn(|| volumes.ensure(&wanted("busy")).unwrap());
        volumes.ensure(&wanted("other")).unwrap();
        assert_eq!(ids(&volumes), ["other"]);
        volumes.remove("other", &nobody).unwrap();
        assert!(volumes.get("busy", &nobody).is_err() && volumes.notices().is_empty());
        assert!(volumes.metrics().contains("flynn_host_volume_provider_up"));
        assert!(!own.is_finished());
        drop(busy);
        own.join().unwrap();
    });
    assert_eq!(ids(&volumes), ["busy"]);
}

#[test]
fn what_cannot_be_removed_keeps_nothing_else() {
    let (_dir, paths, volumes) = host();
    for id in ["one", "two", "three"] {
        volumes.ensure(&wanted(id)).unwrap();
        volumes.decommission(id, &nobody).unwrap();
    }
    let stuck = ids(&volumes)[1].clone();
    // A job comes by it while the others go.
    let looked = std::cell::Cell::new(false);
    let users = |id: &str| {
        if id == stuck && looked.replace(true) {
            vec!["job".to_owned()]
        } else {
            Vec::new()
        }
    };
    let error = volumes.gc(&Gc::default(), &users).unwrap_err();
    assert!(
        error.message.contains("2 volumes were removed") && error.message.contains(&stuck),
        "{error}"
    );
    assert_eq!(ids(&volumes), std::slice::from_ref(&stuck));
    assert_eq!(names(&paths), std::slice::from_ref(&stuck));
    assert_eq!(volumes.gc(&Gc::default(), &nobody).unwrap(), [stuck]);
}

#[test]
fn a_decommissioned_volume_makes_way_and_is_collected() {
    let (_dir, paths, volumes) = host();
    let data = volumes.ensure(&wanted("one")).unwrap();
    fs::write(data.join("file"), "old").unwrap();
    assert!(volumes.decommission("one", &|_| vec!["job".into()]).is_err());
    let old = volumes.decommission("one", &nobody).unwrap();
    assert!(old.id.starts_with("one.until-") && old.decommissioned_at.is_some());
    assert!(!volumes.ensure(&wanted("one")).unwrap().join("file").exists());
    assert!(volumes.ensure(&wanted(&old.id)).is_err());
    let young = Gc {
        older_than: 3600,
        dry_run: false,
    };
    assert!(volumes.gc(&young, &nobody).unwrap().is_empty());
    let dry = Gc {
        older_than: 0,
        dry_run: true,
    };
    assert_eq!(volumes.gc(&dry, &nobody).unwrap(), std::slice::from_ref(&old.id));
    assert_eq!(ids(&volumes), ["one", old.id.as_str()]);
    assert_eq!(volumes.gc(&Gc::default(), &nobody).unwrap(), [old.id]);
    assert_eq!(names(&paths), ["one"]);
}

#[test]
fn a_decommission_that_was_cut_short_is_finished() {
    let (_dir, paths, volumes) = host();
    volumes.ensure(&wanted("one")).unwrap();
    let dir = paths.volumes().join("one");
    let record = Record {
        decommissioned_at: Some(Timestamp::from_second(7).unwrap()),
        ..Record::read(&dir).unwrap().unwrap()
    };
    record.write(&dir).unwrap();
    let volumes = Volumes::open(&paths).unwrap();
    assert_eq!(ids(&volumes), ["one.until-7000"]);
    volumes.ensure(&wanted("one")).unwrap();
}

#[test]
fn what_cannot_be_is_refused_with_the_way_out() {
    let (_dir, paths, volumes) = host();
    volumes.ensure(&wanted("one")).unwrap();
    let new = |id: &str, limit| NewVolume {
        id: Some(id.into()),
        limit,
        ..NewVolume::default()
    };
    for (result, wanted) in [
        (volumes.create("default", new(".x", None)), "no dot in front"),
        (volumes.create("default", new("one", None)), "another id"),
        (volumes.create("default", new("two", Some(1))), "at least 16 MiB"),
        (volumes.create("default", new("two", Some(1 << 62))), "do not fit"),
        (
            volumes.create("other", new("two", None)),
            "flynn-host volume providers",
        ),
        (volumes.snapshot("none", None), "there is no volume none"),
        (
            volumes.resize("none", MIN_LIMIT, &nobody),
            "there is no volume none",
        ),
        (volumes.resize("one", 1, &nobody), "at least 16 MiB"),
        (volumes.resize("one", MIN_LIMIT, &nobody), "plain directory"),
    ] {
        let error = result.unwrap_err();
        assert!(error.message.contains(wanted), "{error}");
    }
    // On a btrfs it would simply be done.
    if !btrfs::is_on(&paths.volumes()).unwrap() {
        let error = volumes.snapshot("one", None).unwrap_err();
        assert!(error.message.contains("--kind btrfs"), "{error}");
    }
    assert_eq!(names(&paths), ["one"]);
}
