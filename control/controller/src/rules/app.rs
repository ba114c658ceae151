//! Apps as people ask for them.

use flynn_api::controller::{App, SYSTEM_APP, SYSTEM_CRITICAL};
use flynn_api::{Error, Result};
use uuid::Uuid;

use super::name;
use crate::deploy::planner::Strategy;

/// Seconds that a deployment's step may take, unless the app says otherwise.
pub(crate) const DEPLOY_TIMEOUT: i32 = 120;

/// A new app with everything filled in.
pub(crate) fn prepare(mut app: App) -> Result<App> {
    if app.id.is_empty() {
        app.id = Uuid::new_v4().to_string();
    }
    app.id = Uuid::try_parse(&app.id)
        .map_err(|_| Error::invalid_field("id", "must be a UUID"))?
        .to_string();
    if app.name.is_empty() {
        app.name = made_up(Uuid::new_v4());
    }
    name::app(&app.name)?;
    if app.strategy.is_empty() {
        app.strategy = Strategy::default().to_string();
    }
    if app.deploy_timeout == 0 {
        app.deploy_timeout = DEPLOY_TIMEOUT;
    }
    if app.release_id.is_some() {
        return Err(Error::invalid_field(
            "release",
            "a new app has none: PUT /apps/{app}/release sets it",
        ));
    }
    check(&app)?;
    Ok(app)
}

/// An app changed as asked. What the request leaves out stays.
pub(crate) fn change(mut app: App, wanted: &App) -> Result<App> {
    if !wanted.id.is_empty() && wanted.id != app.id {
        return Err(Error::invalid_field("id", "is not that of the app in the path"));
    }
    if !wanted.name.is_empty() && wanted.name != app.name {
        return Err(Error::invalid_field(
            "name",
            "an app keeps its name: make another app instead",
        ));
    }
    if wanted.release_id.is_some() && wanted.release_id != app.release_id {
        return Err(Error::invalid_field(
            "release",
            "is set by PUT /apps/{app}/release, or by a deployment",
        ));
    }
    if !wanted.meta.is_empty() {
        app.meta.clone_from(&wanted.meta);
    }
    if !wanted.strategy.is_empty() {
        app.strategy.clone_from(&wanted.strategy);
    }
    if wanted.deploy_timeout != 0 {
        app.deploy_timeout = wanted.deploy_timeout;
    }
    check(&app)?;
    Ok(app)
}

/// An app with these labels and no others.
pub(crate) fn relabel(mut app: App, wanted: &App) -> Result<App> {
    app.meta.clone_from(&wanted.meta);
    check(&app)?;
    Ok(app)
}

fn check(app: &App) -> Result<()> {
    app.strategy.parse::<Strategy>()?;
    name::meta("meta", &app.meta)?;
    for flag in [SYSTEM_APP, SYSTEM_CRITICAL] {
        if app
            .meta
            .get(flag)
            .is_some_and(|value| value != "true" && value != "false")
        {
            return Err(Error::invalid_field(
                &format!("meta.{flag}"),
                "must be true or false",
            ));
        }
    }
    if !(1..=86_400).contains(&app.deploy_timeout) {
        return Err(Error::invalid_field(
            "deploy_timeout",
            "must be 1 to 86400 seconds",
        ));
    }
    Ok(())
}

/// A name for an app whose maker has none in mind, made from random bits.
fn made_up(random: Uuid) -> String {
    const HOW: [&str; 16] = [
        "amber", "brisk", "calm", "deft", "early", "fond", "grand", "hardy", "ivory", "jolly", "keen",
        "lucid", "merry", "noble", "quiet", "swift",
    ];
    const WHAT: [&str; 16] = [
        "badger", "cedar", "dune", "ember", "falcon", "glade", "heron", "island", "juniper", "kestrel",
        "lagoon", "meadow", "otter", "pine", "river", "sparrow",
    ];
    let bytes = random.as_bytes();
    let number = u32::from_be_bytes([bytes[10], bytes[11], bytes[12], bytes[13]]) % 100_000;
    format!(
        "{}-{}-{number:05}",
        HOW[usize::from(bytes[0] % 16)],
        WHAT[usize::from(bytes[1] % 16)]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_filled_in() {
        let app = prepare(App::default()).unwrap();
        assert_eq!((app.strategy.as_str(), app.deploy_timeout), ("all-at-once", 120));
        assert!(name::app(&app.name).is_ok() && Uuid::try_parse(&app.id).is_ok());
    }

    #[test]
    fn what_cannot_be_is_refused_by_field() {
        let named = |name: &str| App {
            name: name.into(),
            ..App::default()
        };
        let strategy = App {
            strategy: "hope".into(),
            ..named("a")
        };
        let error = prepare(strategy).unwrap_err();
        assert!(
            error.message.contains("strategy") && error.message.contains("all-at-once"),
            "{error}"
        );
        assert!(
            prepare(App {
                deploy_timeout: -1,
                ..named("a")
            })
            .is_err()
        );
        assert!(
            prepare(App {
                id: "x".into(),
                ..named("a")
            })
            .is_err()
        );
        let meta = [(SYSTEM_APP.to_owned(), "yes".to_owned())].into();
        assert!(prepare(App { meta, ..named("a") }).is_err());
    }

    #[test]
    fn a_change_keeps_what_it_does_not_name() {
        let app = prepare(App {
            name: "a".into(),
            deploy_timeout: 5,
            ..App::default()
        })
        .unwrap();
        let meta = [("k".to_owned(), "v".to_owned())].into();
        let changed = change(
            app.clone(),
            &App {
                meta,
                ..App::default()
            },
        )
        .unwrap();
        assert_eq!((changed.deploy_timeout, changed.meta.len()), (5, 1));
        assert!(
            change(
                app,
                &App {
                    name: "b".into(),
                    ..App::default()
                }
            )
            .is_err()
        );
    }
}
