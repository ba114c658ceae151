//! Artifacts as builders register them.

use flynn_api::image::{Artifact, ArtifactKind, Hashes, LAYER_SQUASHFS, MANIFEST_V1};
use flynn_api::{Error, Result};
use uuid::Uuid;

use super::name;

/// A new artifact with everything filled in. Its manifest is what its digest says.
pub(crate) fn prepare(mut artifact: Artifact) -> Result<Artifact> {
    if artifact.id.is_empty() {
        artifact.id = Uuid::new_v4().to_string();
    }
    Uuid::try_parse(&artifact.id).map_err(|_| Error::invalid_field("id", "must be a UUID"))?;
    name::meta("meta", &artifact.meta)?;
    if artifact.uri.contains('\0') || artifact.uri.len() > 4096 {
        return Err(Error::invalid_field(
            "uri",
            "holds NUL or is longer than 4096 bytes",
        ));
    }
    if let Some(template) = &artifact.layer_url_template {
        let rule = "must be an http:// or https:// URL with {id} where a layer's digest goes";
        if !template.starts_with("http://") && !template.starts_with("https://") || !template.contains("{id}")
        {
            return Err(Error::invalid_field("layer_url_template", rule));
        }
    }
    match (artifact.kind, &artifact.manifest) {
        (ArtifactKind::Docker, _) => {
            let rule = "`docker` artifacts are no longer made: push the image, which makes a `flynn` one";
            Err(Error::invalid_field("type", rule))
        }
        (ArtifactKind::Flynn, None) => Err(Error::invalid_field(
            "manifest",
            "an image needs one: hosts find its layers there",
        )),
        (ArtifactKind::File, Some(_)) => Err(Error::invalid_field("manifest", "a file has none")),
        (ArtifactKind::File, None) if artifact.uri.is_empty() => {
            Err(Error::invalid_field("uri", "a file needs one"))
        }
        (ArtifactKind::File, None) => Ok(artifact),
        (ArtifactKind::Flynn, Some(_)) => image(artifact),
    }
}

fn image(mut artifact: Artifact) -> Result<Artifact> {
    let Some(manifest) = &artifact.manifest else {
        return Ok(artifact);
    };
    if manifest.kind != MANIFEST_V1 {
        return Err(Error::invalid_field(
            "manifest._type",
            format!("must be {MANIFEST_V1}"),
        ));
    }
    if manifest.layers().is_empty() {
        let rule = "names no layer for linux on amd64, which is what hosts run";
        return Err(Error::invalid_field("manifest.rootfs", rule));
    }
    for (at, layer) in manifest.layers().iter().enumerate() {
        let field = format!("manifest.rootfs.layers[{at}]");
        if layer.kind != LAYER_SQUASHFS {
            return Err(Error::invalid_field(
                &format!("{field}.type"),
                format!("must be {LAYER_SQUASHFS}"),
            ));
        }
        if layer.hashes.sha512_256 != layer.id {
            return Err(Error::invalid_field(
                &format!("{field}.hashes"),
                "is not the digest that is its id",
            ));
        }
    }
    for (key, entrypoint) in &manifest.entrypoints {
        name::env(&format!("manifest.entrypoints.{key}.env"), &entrypoint.env)?;
        name::args(&format!("manifest.entrypoints.{key}.args"), &entrypoint.args)?;
    }
    let (digest, size) = (manifest.id(), manifest.canonical_json().len() as u64);
    if artifact.hashes.is_some_and(|hashes| hashes.sha512_256 != digest) {
        let rule =
            format!("is not the digest of the manifest, which is {digest}: was it cut short or changed?");
        return Err(Error::invalid_field("hashes.sha512_256", rule));
    }
    if artifact.size.is_some_and(|given| given != size) {
        return Err(Error::invalid_field(
            "size",
            format!("is not that of the manifest, which is {size}"),
        ));
    }
    artifact.hashes = Some(Hashes { sha512_256: digest });
    artifact.size = Some(size);
    Ok(artifact)
}

/// An artifact as events show it: without secrets in the environments of its entrypoints.
pub(crate) fn redacted(artifact: &Artifact) -> Artifact {
    let mut shown = artifact.clone();
    for entrypoint in shown
        .manifest
        .iter_mut()
        .flat_map(|manifest| manifest.entrypoints.values_mut())
    {
        entrypoint.env = flynn_api::redact::env(&entrypoint.env);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::Digest;
    use flynn_api::image::{Entrypoint, ImageManifest, Layer};

    fn image() -> Artifact {
        let layer = Layer::squashfs(Digest::of(b"layer"), 5);
        Artifact::image(
            ImageManifest::new(Entrypoint::default(), vec![layer]),
            "http://b/x",
            None,
        )
    }

    #[test]
    fn an_image_is_what_its_digest_says() {
        let artifact = prepare(image()).unwrap();
        assert_eq!(artifact.hashes, image().hashes);
        let wrong = Artifact {
            hashes: Some(Hashes {
                sha512_256: Digest::of(b"x"),
            }),
            ..image()
        };
        assert!(
            prepare(wrong)
                .unwrap_err()
                .message
                .starts_with("hashes.sha512_256: ")
        );
        let bare = prepare(Artifact {
            hashes: None,
            size: None,
            ..image()
        })
        .unwrap();
        assert_eq!((bare.hashes, bare.size), (image().hashes, image().size));
    }

    #[test]
    fn events_carry_no_secret() {
        let mut artifact = image();
        let entrypoint = artifact
            .manifest
            .as_mut()
            .unwrap()
            .entrypoints
            .values_mut()
            .next()
            .unwrap();
        entrypoint.env.insert("DB_PASSWORD".into(), "hunter2".into());
        assert!(
            !serde_json::to_string(&redacted(&artifact))
                .unwrap()
                .contains("hunter2")
        );
    }

    #[test]
    fn what_no_host_could_run_is_refused() {
        let field = |artifact: Artifact| prepare(artifact).unwrap_err().detail.unwrap()["field"].clone();
        assert_eq!(
            field(Artifact {
                manifest: None,
                ..image()
            }),
            "manifest"
        );
        assert_eq!(
            field(Artifact {
                kind: ArtifactKind::Docker,
                ..image()
            }),
            "type"
        );
        assert_eq!(
            field(Artifact {
                size: Some(1),
                ..image()
            }),
            "size"
        );
        let template = Some("http://b/layers".into());
        assert_eq!(
            field(Artifact {
                layer_url_template: template,
                ..image()
            }),
            "layer_url_template"
        );
        let mut empty = image();
        empty.manifest.as_mut().unwrap().rootfs.clear();
        assert_eq!(field(empty), "manifest.rootfs");
        assert_eq!(
            field(Artifact {
                kind: ArtifactKind::File,
                ..Artifact::default()
            }),
            "uri"
        );
    }
}
