//! Names and other short texts.

use flynn_api::{Env, Error, Meta, Result};

/// The longest single string that Linux takes as an argument or variable of a program.
const MAX_STRING: usize = 128 * 1024 - 1;

/// An app's name: it becomes part of domains and services.
pub(crate) fn app(name: &str) -> Result<()> {
    let rule =
        "must be at most 100 lower-case letters, digits and dashes, with a letter or digit at both ends";
    if !is_dashed(name, 100) {
        return Err(Error::invalid_field("name", format!("{name:?} {rule}")));
    }
    if uuid::Uuid::try_parse(name).is_ok() {
        return Err(Error::invalid_field("name", "must not look like an id (a UUID)"));
    }
    Ok(())
}

/// A service's name in discoverd, which is a DNS label.
pub(crate) fn service(field: &str, name: &str) -> Result<()> {
    let rule =
        "must be at most 63 lower-case letters, digits and dashes, with a letter or digit at both ends";
    if is_dashed(name, 63) {
        Ok(())
    } else {
        Err(Error::invalid_field(field, format!("{name:?} {rule}")))
    }
}

/// A process type's name.
pub(crate) fn process_type(field: &str, name: &str) -> Result<()> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if !name.is_empty() && name.len() <= 63 && name.bytes().all(fits) {
        return Ok(());
    }
    let rule = "must be 1 to 63 letters, digits, dashes and underscores";
    Err(Error::invalid_field(field, format!("{name:?} {rule}")))
}

fn is_dashed(name: &str, longest: usize) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=longest).contains(&name.len())
        && name.bytes().all(fits)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Labels.
pub(crate) fn meta(field: &str, meta: &Meta) -> Result<()> {
    if meta.len() > 256 {
        return Err(Error::invalid_field(field, "has more than 256 entries"));
    }
    for (key, value) in meta {
        if key.is_empty() || key.len() > 256 || key.contains('\0') {
            return Err(Error::invalid_field(
                field,
                "has a key that is empty, holds NUL or is longer than 256 bytes",
            ));
        }
        if value.len() > 64 * 1024 || value.contains('\0') {
            let field = format!("{field}.{key}");
            return Err(Error::invalid_field(&field, "holds NUL or is longer than 64 KiB"));
        }
    }
    Ok(())
}

/// Environment variables. Values are never quoted: they may be secret.
pub(crate) fn env(field: &str, env: &Env) -> Result<()> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) {
            let rule = "is not a variable's name: it must not be empty nor hold = or NUL";
            return Err(Error::invalid_field(field, format!("{name:?} {rule}")));
        }
        let field = format!("{field}.{name}");
        if value.contains('\0') {
            return Err(Error::invalid_field(
                &field,
                "holds a NUL character, which no environment can",
            ));
        }
        if name.len() + value.len() + 1 > MAX_STRING {
            return Err(Error::invalid_field(
                &field,
                "is longer than 128 KiB, the most that Linux takes",
            ));
        }
    }
    Ok(())
}

/// A program's arguments.
pub(crate) fn args(field: &str, args: &[String]) -> Result<()> {
    if args.len() > 4096 {
        return Err(Error::invalid_field(field, "has more than 4096 arguments"));
    }
    match args
        .iter()
        .position(|arg| arg.contains('\0') || arg.len() > MAX_STRING)
    {
        None => Ok(()),
        Some(at) => {
            let rule = "holds a NUL character or is longer than 128 KiB, which Linux takes from no one";
            Err(Error::invalid_field(&format!("{field}[{at}]"), rule))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn app_names() {
        for good in ["a", "web-1", "0", &"x".repeat(100)] {
            assert!(app(good).is_ok(), "{good}");
        }
        let long = "x".repeat(101);
        let uuid = "0b7a1c5e-1111-4222-8333-444455556666";
        for bad in ["", "-a", "a-", "A", "a.b", "a b", "ä", &long, uuid] {
            let error = app(bad).unwrap_err();
            assert!(error.message.starts_with("name: "), "{bad}: {error}");
        }
    }

    #[test]
    fn secrets_stay_out_of_messages() {
        let error = env("env", &Env::from([("KEY".into(), "s3cret\0".into())])).unwrap_err();
        assert!(error.message.contains("env.KEY") && !error.message.contains("s3cret"));
        assert!(env("env", &Env::from([("A=B".into(), String::new())])).is_err());
    }

    proptest! {
        #[test]
        fn names_that_pass_are_dns_labels(name in "\\PC{0,70}") {
            if service("service", &name).is_ok() {
                prop_assert!(name.len() <= 63);
                prop_assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            }
        }
    }
}
