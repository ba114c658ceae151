//! One thing done to several.

use serde::Serialize;

use super::print_json;

/// What came of it.
#[derive(Serialize)]
struct Outcome {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Which jobs.
#[derive(clap::Args, Debug)]
pub struct Jobs {
    /// Their ids, or the starts of them
    #[arg(required = true)]
    pub(super) jobs: Vec<String>,
    /// As JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Tries it with all that are named, whatever comes of one. `act` gives the whole id of the one that it is told, and `say` what
/// is to be said of it.
pub(super) async fn each(
    names: &[String],
    json: bool,
    say: impl Fn(&str) -> String,
    act: impl AsyncFn(&str) -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    let mut outcomes = Vec::new();
    for name in names {
        let outcome = match act(name).await {
            Ok(id) => Outcome { id, error: None },
            // Nothing but that is to be said.
            Err(error) if names.len() == 1 && !json => return Err(error),
            Err(error) => Outcome {
                id: name.clone(),
                error: Some(format!("{error:#}")),
            },
        };
        match &outcome.error {
            _ if json => {}
            None => println!("{}", say(&outcome.id)),
            Some(error) => eprintln!("flynn-host: {name}: {error}"),
        }
        outcomes.push(outcome);
    }
    if json {
        print_json(&outcomes)?;
    }
    let failed = outcomes.iter().filter(|outcome| outcome.error.is_some()).count();
    anyhow::ensure!(
        failed == 0,
        "of {} it could not be done with {failed}",
        names.len()
    );
    Ok(())
}
