//! Archives as tools write them, and as they should not be.

use std::fs;

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn config(layers: &[&[u8]]) -> Vec<u8> {
    let ids: Vec<_> = layers.iter().map(|layer| sha256(layer)).collect();
    json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids}})
        .to_string()
        .into_bytes()
}

fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        if let Some(target) = name.strip_suffix('@') {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            tar.append_link(&mut header, target, std::str::from_utf8(content).unwrap())
                .unwrap();
            continue;
        }
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, name, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

fn docker_archive() -> Vec<u8> {
    let config = config(&[b"low", b"low", b"high"]);
    let config_name = format!("{}.json", &sha256(&config)[7..]);
    let manifest = json!([{"Config": config_name, "RepoTags": ["web:latest"], "Layers": ["a/layer.tar", "b/layer.tar", "c.tar"]}]);
    tar_of(&[
        (&config_name, &config),
        ("a/layer.tar", b"low"),
        ("b/layer.tar@", b"../a/layer.tar"),
        ("./c.tar", b"high"),
        ("manifest.json", manifest.to_string().as_bytes()),
    ])
}

fn contents(image: &Image) -> Vec<String> {
    image
        .layers
        .iter()
        .map(|layer| {
            let mut text = String::new();
            image.read(layer).unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text.len() as u64, layer.size);
            text
        })
        .collect()
}

fn open(bytes: &[u8], name: Option<&str>) -> Result<Image, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("archive");
    fs::write(&path, bytes).unwrap();
    Image::open(&path, name)
}

fn why(result: Result<Image, Error>) -> String {
    result.err().map(|error| error.message).unwrap_or_default()
}

#[test]
fn docker_archives_are_read_plain_and_compressed() {
    let plain = docker_archive();
    let gzip = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, &plain).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = zstd::encode_all(plain.as_slice(), 0).unwrap();
    for bytes in [&plain, &gzip, &zstd] {
        let image = open(bytes, None).unwrap();
        assert_eq!(contents(&image), ["low", "low", "high"]);
        assert_eq!(image.name.as_deref(), Some("web:latest"));
        assert_eq!(image.layers[2].id, sha256(b"high"));
    }
    assert!(open(&plain, Some("web")).is_ok() && open(&plain, Some("web:latest")).is_ok());
    assert!(why(open(&plain, Some("other"))).contains("web:latest"));
    assert!(why(open(&gzip[..gzip.len() - 10], None)).contains("cut short"));
    assert_eq!(
        contents(&Image::from_reader(plain.as_slice(), None).unwrap()).len(),
        3
    );
}

/// An OCI layout in a directory, with an index for two platforms.
fn layout(layer: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let blob = |bytes: &[u8]| {
        fs::write(blobs.join(&sha256(bytes)[7..]), bytes).unwrap();
        sha256(bytes)
    };
    let config = blob(&config(&[layer]));
    let layer = blob(layer);
    let manifest = blob(
        json!({"config": {"digest": config}, "layers": [{"digest": layer}]})
            .to_string()
            .as_bytes(),
    );
    let index = json!({"manifests": [
        {"digest": sha256(b"other"), "platform": {"architecture": "arm64", "os": "linux"}},
        {"digest": manifest, "platform": {"architecture": "amd64", "os": "linux"}},
    ]});
    let index = blob(index.to_string().as_bytes());
    let top = json!({"manifests": [{
        "digest": index, "mediaType": "application/vnd.oci.image.index.v1+json",
        "annotations": {"org.opencontainers.image.ref.name": "v1"},
    }]});
    fs::write(dir.path().join("index.json"), top.to_string()).unwrap();
    dir
}

#[test]
fn oci_layouts_are_read_as_directory_and_tar() {
    let dir = layout(b"layer");
    let image = Image::open(dir.path(), Some("v1")).unwrap();
    assert_eq!(contents(&image), ["layer"]);
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_dir_all(".", dir.path()).unwrap();
    let bytes = tar.into_inner().unwrap();
    assert_eq!(contents(&open(&bytes, None).unwrap()), ["layer"]);
    assert!(why(Image::open(dir.path(), Some("v2"))).contains("v1"));
}

#[test]
fn damage_is_found() {
    let dir = layout(b"layer");
    let blob = dir
        .path()
        .join("blobs/sha256")
        .join(&sha256(&config(&[b"layer"]))[7..]);
    let good = fs::read(&blob).unwrap();
    fs::write(&blob, good.iter().map(|byte| byte ^ 1).collect::<Vec<_>>()).unwrap();
    assert!(why(Image::open(dir.path(), None)).contains("digest"));
    fs::remove_file(&blob).unwrap();
    assert!(why(Image::open(dir.path(), None)).contains("not in it"));

    let wrong_name = format!("{}.json", "a".repeat(64));
    let manifest = json!([{"Config": wrong_name, "RepoTags": null, "Layers": []}]).to_string();
    let bytes = tar_of(&[("manifest.json", manifest.as_bytes()), (&wrong_name, b"{}")]);
    assert!(why(open(&bytes, None)).contains("digest"));

    let manifest = json!([{"Config": "c.json", "Layers": ["../../etc/passwd"]}]).to_string();
    for layers in [1, 2] {
        let config = config(&vec![&b"x"[..]; layers]);
        let bytes = tar_of(&[("manifest.json", manifest.as_bytes()), ("c.json", &config)]);
        let why = why(open(&bytes, None));
        assert!(
            why.contains(if layers == 1 { "not in it" } else { "lists 2" }),
            "{why}"
        );
    }
    assert!(why(open(b"", None)).contains("docker save"));
    assert!(why(Image::open(Path::new("/nonexistent/x"), None)).contains("no such file"));
}

#[test]
fn links_in_a_circle_end() {
    let manifest = json!([{"Config": "c.json", "Layers": ["a"]}]).to_string();
    let config = config(&[b"x"]);
    let bytes = tar_of(&[
        ("manifest.json", manifest.as_bytes()),
        ("c.json", &config),
        ("a@", b"b"),
        ("b@", b"a"),
    ]);
    assert!(why(open(&bytes, None)).contains("not in it"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn an_archive_cut_anywhere_is_refused_or_whole(cut in 0usize..docker_archive().len()) {
        let bytes = docker_archive();
        if let Ok(image) = open(&bytes[..cut], None) {
            prop_assert_eq!(contents(&image), ["low", "low", "high"]);
        }
    }

    #[test]
    fn damage_never_panics(at in 0usize..docker_archive().len(), byte: u8) {
        let mut bytes = docker_archive();
        bytes[at] = byte;
        let _ = open(&bytes, None);
    }
}
