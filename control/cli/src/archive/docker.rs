//! docker-archive: `manifest.json` lists images, each with a configuration and layers.

use flynn_api::Error;
use serde::Deserialize;

use super::store::Store;
use super::{Found, broken, choose, is_hex_digest, verify};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Listed {
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }
}

/// Finds the image called `name`, or the only one.
pub(super) fn find(store: &Store, name: Option<&str>) -> Result<Found, Error> {
    let json = store.read_json("manifest.json")?;
    let images: Vec<Listed> = serde_json::from_slice(&json)
        .map_err(|why| broken(format!("manifest.json cannot be read: {why}")))?;
    let names: Vec<_> = images.iter().flat_map(Listed::tags).cloned().collect();
    let image = match (name, images.as_slice()) {
        (_, []) => return Err(broken("it has no image")),
        (None, [only]) => only,
        (None, _) => return Err(choose(None, &names)),
        (Some(name), _) => {
            let fits = |tag: &String| tag == name || tag.strip_suffix(":latest") == Some(name);
            images
                .iter()
                .find(|image| image.tags().iter().any(fits))
                .ok_or_else(|| choose(Some(name), &names))?
        }
    };
    let config = store.read_json(&image.config)?;
    // Some tools name the configuration by its digest.
    let stem = image.config.rsplit('/').next().unwrap_or_default();
    let stem = stem.strip_suffix(".json").unwrap_or(stem);
    if is_hex_digest(stem) {
        verify("the image's configuration", &config, &format!("sha256:{stem}"))?;
    }
    Ok(Found {
        name: image.tags().first().cloned(),
        config,
        paths: image.layers.clone(),
    })
}
