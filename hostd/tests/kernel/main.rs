//! The daemon, its supervisors and containers on a real kernel.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says what is wrong by panicking"
)]

mod apparmor;
mod attached;
mod clients;
mod commands;
mod container;
mod cycles;
mod disk;
mod escape;
mod faults;
mod host;
mod images;
mod job_limits;
mod life;
mod logs;
mod network;
mod openapi;
#[path = "../sinks/receiver.rs"]
mod receiver;
mod streams;
mod takeover;
mod upgrade;
mod user_namespaces;
mod volumes;

use std::future::Future;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

use self::volumes::{crashes, destroy, limits, power, snapshots, transfer, zfs};

/// Tests by their names.
type Tests = Vec<(&'static str, fn())>;

/// A test: its name, and a run of it on a thread of its own, whose namespaces it may change.
macro_rules! tests {
    ($($module:ident: $($name:ident)*;)*) => {
        vec![$($((stringify!($name), (|| run($module::$name())) as fn())),*),*]
    };
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let lacks = host::lacks();
    let tests: Tests = tests![
        container: runs_a_program_in_its_own_world keeps_layers_and_runs_apart limits_memory limits_processes
            drops_capabilities_and_filters_calls runs_as_another_user masks_and_hides mounts_volumes
            gives_the_router_its_pins names_what_cannot_be_started;
        life: signals_and_stops kills_who_does_not_stop restarts_what_is_to_be_kept rotates_logs follows_logs
            refuses_bad_jobs reports_events checks_ports pauses_and_resumes commands_check_health commands_that_fail_are_explained;
        job_limits: cores_weights_swap_and_disk_are_limited limits_change_while_a_job_runs
            want_is_told_and_use_is_counted;
        logs: sinks_get_each_line_once;
        attached: pipes_lose_nothing terminals_have_sizes_and_signals attaches_before_and_after programs_run_beside_the_job_s
            programs_end_with_their_client_or_their_job ports_of_jobs_are_reached;
        faults: containers_outlive_the_daemon an_end_without_a_daemon_is_kept
            a_container_dies_with_its_supervisor a_kept_job_survives_its_supervisor a_stop_between_two_starts_is_kept
            a_broken_record_harms_no_other
            a_container_that_hangs_is_stopped_soon devices_are_refused_before_the_start
            wrong_layers_leave_nothing a_full_disk_is_said_and_survived a_job_that_fills_the_disk_can_end a_new_boot_is_noticed a_kept_job_comes_back_after_a_shutdown
            two_daemons_do_not_share_a_state;
        disk: a_disk_that_is_full_at_any_step_is_said_and_survived;
        upgrade: an_update_is_noticed_by_nobody nobody_lingers_without_a_successor an_update_that_fails_changes_nothing a_new_program_is_put_in_place
            supervisors_of_other_versions_are_understood
            updates_under_load_lose_nothing kills_under_load_lose_nothing;
        clients: who_leaves_makes_room who_is_slow_gets_it_all who_stands_still_holds_up_no_end
            who_reads_no_input_holds_up_nothing_else;
        takeover: nobody_is_in_the_way_of_systemd_s_next;
        commands: tags_and_drains_are_kept what_is_ill_is_mended what_there_is_to_know_is_collected
            machines_are_looked_at_before_they_are_hosts commands_say_what_came_of_each;
        cycles: cycles_leave_nothing;
        images: damaged_layers_are_set_aside_and_fetched_again fetches_go_on_after_the_daemon_s_end
            layers_are_collected_before_the_disk_is_full collecting_takes_nothing_from_starting_jobs
            releases_survive_kills_of_the_downloader a_release_s_program_takes_over a_full_disk_in_the_middle_leaves_what_came;
        network: containers_have_addresses a_network_is_remembered_in_the_end addresses_of_spares_come_back services_are_registered missing_layers_are_fetched
            other_hosts_are_encrypted_with_or_named;
        openapi: calls_are_as_the_document_says;
        escape: our_program_is_read_only_for_containers images_grant_no_capabilities a_job_s_null_device_is_not_trusted deep_directories_are_removed;
    ];
    let on_ext4: Tests = tests![
        faults: supervisors_killed_while_they_start_leave_nothing;
        job_limits: temporary_disks_are_full_for_their_job_alone;
        limits: a_full_image_is_contained;
        crashes: images_outlive_daemons_and_boots;
        destroy: all_volumes_are_destroyed_or_none;
    ];
    let of_apparmor: Tests = tests![
        apparmor: jobs_are_confined_and_the_platform_s_are_not;
    ];
    let of_users: Tests = tests![
        user_namespaces: root_is_nobody_on_the_host volumes_are_handed_on some_jobs_have_none ranges_are_one_jobs_alone
            limits_of_users_are_each_jobs_own;
    ];
    let of_users_and_volumes: Tests = tests![user_namespaces: volumes_of_all_kinds_are_handed_on;];
    let on_ext4_that_grows: Tests = tests![
        limits: images_grow releases_raise_limits;
    ];
    let on_btrfs: Tests = tests![
        disk: a_power_cut_loses_nothing_that_was_said;
        limits: a_full_subvolume_is_contained subvolumes_are_resized;
        snapshots: snapshots_forks_and_rollbacks;
        transfer: snapshots_are_sent_and_received streams_write_nowhere_else;
        crashes: volumes_survive_kills;
        power: subvolumes_survive_power_cuts what_was_received_survives_a_power_cut images_survive_power_cuts;
    ];
    let on_zfs: Tests = tests![
        zfs: a_full_dataset_is_contained datasets_have_snapshots datasets_are_sent_and_received datasets_survive_kills;
    ];
    let no_users = lacks.clone().or_else(user_namespaces::lacks);
    let no_apparmor = lacks.clone().or_else(apparmor::lacks);
    let no_ext4 = lacks.clone().or_else(|| volumes::lacks("ext4", "e2fsprogs"));
    let no_btrfs = lacks.clone().or_else(|| volumes::lacks("btrfs", "btrfs-progs"));
    let trial = |lacks: &Option<String>, (name, test): (&'static str, fn())| match lacks {
        None => Trial::test(name, move || {
            test();
            Ok(())
        }),
        Some(why) => Trial::test(name, || Ok(()))
            .with_kind(format!("skipped: {why}"))
            .with_ignored_flag(true),
    };
    let no_growth = no_ext4.clone().or_else(volumes::cannot_grow);
    let no_zfs = lacks.clone().or_else(zfs::lacks);
    let neither = no_users
        .clone()
        .or_else(|| no_ext4.clone())
        .or_else(|| no_btrfs.clone());
    let all = [
        (tests, lacks),
        (of_users, no_users),
        (of_apparmor, no_apparmor),
        (of_users_and_volumes, neither),
        (on_ext4, no_ext4),
        (on_ext4_that_grows, no_growth),
        (on_btrfs, no_btrfs),
        (on_zfs, no_zfs),
    ];
    let trials = all
        .into_iter()
        .flat_map(|(tests, lacks)| tests.into_iter().map(move |test| trial(&lacks, test)));
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
