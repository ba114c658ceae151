//! Keeps secrets out of what people see: `inspect`, events, logs, errors.

use crate::Env;

/// What stands where a secret stood.
pub const REDACTED: &str = "[redacted]";

/// Whether a variable of this name holds a secret by its name alone.
pub fn is_secret(name: &str) -> bool {
    const WORDS: [&str; 8] = [
        "KEY",
        "TOKEN",
        "PASS",
        "SECRET",
        "CERT",
        "CREDENTIAL",
        "PRIVATE",
        "AUTH",
    ];
    let name = name.to_ascii_uppercase();
    WORDS.iter().any(|word| name.contains(word))
}

/// Whether a value is a URL with a password in it.
fn has_password(value: &str) -> bool {
    value
        .split_once("://")
        .and_then(|(_, rest)| rest.split(['/', '?', '#']).next())
        .and_then(|authority| authority.rsplit_once('@'))
        .is_some_and(|(user, _)| user.contains(':'))
}

/// The environment with each secret's value replaced.
pub fn env(env: &Env) -> Env {
    env.iter()
        .map(|(name, value)| {
            let hide = is_secret(name) || has_password(value);
            (
                name.clone(),
                if hide { REDACTED.to_owned() } else { value.clone() },
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hides_names_and_urls_that_carry_secrets() {
        let shown = env(&Env::from([
            ("AUTH_KEY".into(), "k".into()),
            (
                "DATABASE_URL".into(),
                "postgres://u:p@leader.postgres.discoverd/db".into(),
            ),
            ("PAGE_URL".into(), "https://example.com/a:b@c".into()),
            ("PGPASSWORD".into(), "p".into()),
            ("PORT".into(), "80".into()),
        ]));
        let hidden: Vec<_> = shown
            .iter()
            .filter(|(_, v)| *v == REDACTED)
            .map(|(k, _)| k.as_str())
            .collect();
        assert_eq!(hidden, ["AUTH_KEY", "DATABASE_URL", "PGPASSWORD"]);
    }
}
