//! Makes an image manifest of a docker image's configuration and its converted layers.

use flynn_api::image::{Entrypoint, ImageManifest};
use flynn_api::receive::DockerImage;
use flynn_api::{Env, Error, Result};

use crate::library::Record;
use crate::limits::MAX_LAYERS;
use crate::users::Accounts;

/// Meta key of a manifest: the ports that the image says it listens on.
const EXPOSED_PORTS: &str = "docker.exposed_ports";

/// Checks an id: `sha256:` and 64 hex digits.
pub(crate) fn check_id(id: &str) -> Result<()> {
    let digits = id.strip_prefix("sha256:").unwrap_or_default();
    let good = digits.len() == 64
        && digits
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if good {
        return Ok(());
    }
    let shown: String = id.chars().take(80).collect();
    Err(Error::validation(format!(
        "{shown:?} is not the id of a docker layer: sha256: and 64 hex digits are wanted"
    )))
}

/// Checks what does not depend on the layers.
pub(crate) fn check(image: &DockerImage) -> Result<()> {
    for (name, found, wanted) in [
        ("os", &image.os, "linux"),
        ("architecture", &image.architecture, "amd64"),
    ] {
        if !found.is_empty() && found != wanted {
            let why = format!(
                "the image is made for {found:?}, hosts are {wanted}; build or pull it for linux/amd64"
            );
            return Err(Error::invalid_field(&format!("config.{name}"), why));
        }
    }
    let layers = &image.rootfs.diff_ids;
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        let why = format!("an image has 1 to {MAX_LAYERS} layers, this one {}", layers.len());
        return Err(Error::invalid_field("config.rootfs.diff_ids", why));
    }
    layers.iter().try_for_each(|id| check_id(id))
}

/// The manifest of an image whose layers are `records`, lowest first.
pub(crate) fn manifest(image: &DockerImage, records: Vec<Record>) -> Result<ImageManifest> {
    let config = image.config.clone().unwrap_or_default();
    let user = accounts(&records)
        .resolve(&config.user.unwrap_or_default())
        .map_err(|why| Error::invalid_field("config.config.User", why))?;
    let mut env = Env::new();
    for variable in config.env.unwrap_or_default() {
        match variable.split_once('=') {
            Some((name, value)) if !name.is_empty() => env.insert(name.to_owned(), value.to_owned()),
            _ => {
                return Err(Error::invalid_field(
                    "config.config.Env",
                    "a variable is not of the form NAME=value",
                ));
            }
        };
    }
    let entrypoint = Entrypoint {
        env,
        working_dir: config.working_dir.filter(|directory| !directory.is_empty()),
        args: [
            config.entrypoint.unwrap_or_default(),
            config.cmd.unwrap_or_default(),
        ]
        .concat(),
        uid: user.map(|(uid, _)| uid),
        gid: user.map(|(_, gid)| gid),
        ..Entrypoint::default()
    };
    // What lies below a layer that hides everything is never seen.
    let lowest = records.iter().rposition(|record| record.opaque).unwrap_or(0);
    let layers = records
        .into_iter()
        .skip(lowest)
        .map(|record| record.layer)
        .collect();
    let mut manifest = ImageManifest::new(entrypoint, layers);
    let ports: Vec<_> = image.tcp_ports().iter().map(u16::to_string).collect();
    if !ports.is_empty() {
        manifest.meta.insert(EXPOSED_PORTS.into(), ports.join(","));
    }
    Ok(manifest)
}

/// Each file is that of the highest layer that has it.
fn accounts(records: &[Record]) -> Accounts {
    let highest =
        |file: fn(&Record) -> &Option<String>| records.iter().rev().find_map(|record| file(record).clone());
    Accounts {
        passwd: highest(|record| &record.passwd),
        group: highest(|record| &record.group),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::Digest;
    use flynn_api::image::Layer;

    fn record(name: &str) -> Record {
        Record {
            layer: Layer::squashfs(Digest::of(name.as_bytes()), 1),
            opaque: false,
            passwd: None,
            group: None,
        }
    }

    fn image(json: &serde_json::Value) -> DockerImage {
        serde_json::from_value(json.clone()).unwrap()
    }

    #[test]
    fn the_configuration_is_carried_over() {
        let image = image(&serde_json::json!({
            "architecture": "amd64", "os": "linux", "history": [], "rootfs": {"type": "layers", "diff_ids": []},
            "config": {"User": "web", "Env": ["PATH=/bin", "A=b=c"], "Entrypoint": ["/e"], "Cmd": ["c"],
                "WorkingDir": "/srv", "ExposedPorts": {"443/tcp": {}, "80/tcp": {}, "53/udp": {}}, "Labels": null},
        }));
        let mut low = record("low");
        low.passwd = Some("web:x:1:2:::".into());
        let mut high = record("high");
        high.passwd = Some("web:x:3:4:::".into());
        let made = manifest(&image, vec![low, high, record("top")]).unwrap();
        let entrypoint = made.default_entrypoint().unwrap();
        assert_eq!(entrypoint.args, ["/e", "c"]);
        assert_eq!((entrypoint.uid, entrypoint.gid), (Some(3), Some(4)));
        assert_eq!(entrypoint.env["A"], "b=c");
        assert_eq!(entrypoint.working_dir.as_deref(), Some("/srv"));
        assert_eq!(made.meta[EXPOSED_PORTS], "80,443");
        assert_eq!(made.layers().len(), 3);
    }

    #[test]
    fn what_is_hidden_is_left_out() {
        let mut middle = record("middle");
        middle.opaque = true;
        let made = manifest(
            &DockerImage::default(),
            vec![record("low"), middle, record("top")],
        )
        .unwrap();
        assert_eq!(made.layers().len(), 2);
    }

    #[test]
    fn foreign_and_broken_images_are_refused() {
        let diff_id = format!("sha256:{}", "a".repeat(64));
        let of = |architecture: &str, id: &str| {
            image(
                &serde_json::json!({"architecture": architecture, "os": "linux", "rootfs": {"diff_ids": [id]}}),
            )
        };
        assert!(check(&of("amd64", &diff_id)).is_ok());
        assert!(check(&of("arm64", &diff_id)).is_err_and(|why| why.message.contains("linux/amd64")));
        for id in [
            "",
            "sha256:abc",
            "../x",
            &diff_id.to_uppercase(),
            &format!("{diff_id}/.."),
        ] {
            assert!(check(&of("amd64", id)).is_err(), "{id}");
        }
        assert!(check(&image(&serde_json::json!({"rootfs": {"diff_ids": []}}))).is_err());
        let env = image(&serde_json::json!({"config": {"Env": ["=x"]}, "rootfs": {"diff_ids": []}}));
        assert!(manifest(&env, vec![record("a")]).is_err());
    }
}
