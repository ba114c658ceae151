//! The bootstrap manifest: the apps that make up the platform, in the order in which they start.

use std::collections::BTreeMap;

use flynn_api::controller::{
    App, ExpandedFormation, ProcessType, Processes, Release, SYSTEM_APP, SYSTEM_CRITICAL,
};
use flynn_api::image::{Artifact, ImageManifest};
use flynn_api::route::Route;
use flynn_api::{Env, Meta};
use serde::Deserialize;
use serde_json::Value;

/// The manifest that is used unless another is given.
pub(super) const DEFAULT: &str = include_str!("manifest.json");

/// What a cluster starts with.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    /// 1.
    pub version: u32,
    /// In starting order.
    pub apps: Vec<SystemApp>,
}

/// Who starts an app.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Start {
    /// Bootstrap, through the host's API, before there is a controller.
    Host,
    /// Bootstrap, once the controller knows all apps: the scheduler, which would stop what it knows no formation of.
    Adopted,
    /// The controller and the scheduler.
    #[default]
    Controller,
}

/// One app of the platform.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SystemApp {
    /// Its name.
    pub name: String,
    /// The image that it runs: `<name>.json` in the host's images.
    pub image: String,
    /// Who starts it.
    #[serde(default)]
    pub start: Start,
    /// It cannot be scaled to nothing.
    #[serde(default)]
    pub critical: bool,
    /// The service that has a leader once the app is of use.
    #[serde(default)]
    pub wait_leader: Option<String>,
    /// Environment of every process.
    #[serde(default)]
    pub env: Env,
    /// Process types.
    pub processes: BTreeMap<String, ProcessType>,
    /// How many of each; those of omni types are per host.
    pub scale: Processes,
    /// Its routes.
    #[serde(default)]
    pub routes: Vec<Route>,
}

/// The ids that an app gets before the controller is there to give any.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, Deserialize)]
pub(super) struct AppIds {
    /// The app's.
    pub app: String,
    /// Its first release's.
    pub release: String,
}

impl Manifest {
    /// Reads a manifest, with each `${NAME}` in its texts replaced.
    ///
    /// # Errors
    /// When it is not JSON of this form, names a variable that is not there, or another version.
    pub(super) fn read(json: &str, variables: &BTreeMap<&str, String>) -> Result<Self, String> {
        let mut value: Value = serde_json::from_str(json).map_err(|why| format!("it is not JSON: {why}"))?;
        fill(&mut value, variables)?;
        let manifest: Self = serde_json::from_value(value).map_err(|why| why.to_string())?;
        if manifest.version != 1 {
            return Err(format!("version {} is not known here; 1 is", manifest.version));
        }
        Ok(manifest)
    }
}

/// Replaces the variables in all texts of a value. What is put in is never looked at again.
fn fill(value: &mut Value, variables: &BTreeMap<&str, String>) -> Result<(), String> {
    match value {
        Value::String(text) => *text = fill_text(text, variables)?,
        Value::Array(values) => values.iter_mut().try_for_each(|value| fill(value, variables))?,
        Value::Object(fields) => fields.values_mut().try_for_each(|value| fill(value, variables))?,
        _ => {}
    }
    Ok(())
}

fn fill_text(text: &str, variables: &BTreeMap<&str, String>) -> Result<String, String> {
    let mut filled = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let (name, after) = after
            .split_once('}')
            .ok_or_else(|| format!("{text:?} has no `}}` after its `${{`"))?;
        let value = variables.get(name).ok_or_else(|| {
            let known: Vec<_> = variables.keys().copied().collect();
            format!("there is no variable {name:?}; there are {}", known.join(", "))
        })?;
        filled.push_str(before);
        filled.push_str(value);
        rest = after;
    }
    filled.push_str(rest);
    Ok(filled)
}

impl SystemApp {
    /// The app as the controller will know it.
    pub(super) fn app(&self, ids: &AppIds) -> App {
        let mut meta = Meta::from([(SYSTEM_APP.into(), "true".into())]);
        if self.critical {
            meta.insert(SYSTEM_CRITICAL.into(), "true".into());
        }
        App {
            id: ids.app.clone(),
            name: self.name.clone(),
            meta,
            ..App::default()
        }
    }

    /// Its first release.
    pub(super) fn release(&self, ids: &AppIds, artifact_id: &str) -> Release {
        Release {
            id: ids.release.clone(),
            app_id: Some(ids.app.clone()),
            artifact_ids: vec![artifact_id.to_owned()],
            env: self.env.clone(),
            processes: self.processes.clone(),
            ..Release::default()
        }
    }

    /// Its formation, to make jobs of before there is a controller.
    pub(super) fn formation(&self, ids: &AppIds, image: &ImageManifest) -> ExpandedFormation {
        ExpandedFormation {
            app: self.app(ids),
            release: self.release(ids, ""),
            artifacts: vec![artifact(image)],
            processes: self.scale.clone(),
            generation: 1,
            ..ExpandedFormation::default()
        }
    }
}

/// The artifact of an image that every host has: its layers are fetched from nowhere.
pub(super) fn artifact(image: &ImageManifest) -> Artifact {
    Artifact::image(image.clone(), format!("flynn-image:{}", image.id()), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables() -> BTreeMap<&'static str, String> {
        [
            "DOMAIN",
            "CONTROLLER_KEY",
            "POSTGRES_PASSWORD",
            "BLOBSTORE_KEY",
            "TLS_CERT",
            "TLS_KEY",
        ]
        .map(|name| (name, format!("<{name}>")))
        .into()
    }

    /// Wherever the platform's apps register, containers of others do not.
    #[test]
    fn its_services_are_the_platform_s() {
        let manifest: Value = serde_json::from_str(DEFAULT).unwrap();
        let mut services = Vec::new();
        let mut left = vec![&manifest];
        while let Some(value) = left.pop() {
            if let Some(name) = value.pointer("/service/name") {
                services.push(name.as_str().unwrap());
            }
            left.extend(value.as_array().into_iter().flatten());
            left.extend(value.as_object().into_iter().flat_map(serde_json::Map::values));
        }
        services.sort_unstable();
        assert_eq!(services, flynn_api::discovery::PLATFORM_SERVICES);
    }

    #[test]
    fn the_default_manifest_is_whole() {
        let manifest = Manifest::read(DEFAULT, &variables()).unwrap();
        let names: Vec<_> = manifest.apps.iter().map(|app| app.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "discoverd",
                "postgres",
                "controller",
                "scheduler",
                "router",
                "blobstore",
                "tarreceive"
            ]
        );
        for app in &manifest.apps {
            assert!(
                app.scale.keys().all(|name| app.processes.contains_key(name)),
                "{}",
                app.name
            );
        }
        assert_eq!(manifest.apps[2].routes[0].domain, "controller.<DOMAIN>");
    }

    #[test]
    fn what_is_put_in_is_not_read_again() {
        let variables = BTreeMap::from([("A", "${B}\"".to_owned()), ("B", "b".to_owned())]);
        assert_eq!(fill_text("x${A}${B}$y", &variables).unwrap(), "x${B}\"b$y");
        assert!(
            fill_text("${C}", &variables)
                .unwrap_err()
                .contains("there are A, B")
        );
        assert!(fill_text("${A", &variables).is_err());
    }

    #[test]
    fn mistakes_are_named() {
        let read = |json| Manifest::read(json, &BTreeMap::new()).unwrap_err();
        assert!(read(r#"{"version":1,"apps":[{"nam":"x"}]}"#).contains("nam"));
        assert!(read(r#"{"version":2,"apps":[]}"#).contains("version 2"));
        assert!(read("{").contains("not JSON"));
    }
}
