//! Questions before something is destroyed.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use crate::failure::{Result, local, usage};

/// Asks; `yes` answers at once. Where nobody can be asked, it is an error that says how to go on.
pub(crate) fn confirm(question: &str, yes: bool) -> Result<()> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(usage(format!(
            "{question} Nobody can be asked here: add --yes if that is what you want"
        )));
    }
    let mut answer = String::new();
    eprint!("{question} (yes/no): ");
    let asked = io::stderr()
        .flush()
        .and_then(|()| io::stdin().lock().read_line(&mut answer));
    asked.map_err(|why| local("the answer cannot be read", &why))?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(usage("not confirmed; nothing was changed")),
    }
}
